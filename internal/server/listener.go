package server

import (
	"crypto/tls"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"time"

	"github.com/writsec/writ/internal/config"
)

// maxHeaders bounds the header of a request: two tokens of 16 KiB and some more.
const maxHeaders = 64 << 10

// listener is an HTTP server and the socket it serves.
type listener struct {
	net.Listener
	server *http.Server
}

func listen(addr string, h http.Handler, writeTimeout time.Duration, log *slog.Logger) (listener, error) {
	socket, err := net.Listen("tcp", addr)
	if err != nil {
		return listener{}, fmt.Errorf("listen: %w", err)
	}
	return listener{
		Listener: socket,
		server: &http.Server{
			Handler:           h,
			ReadHeaderTimeout: 5 * time.Second,
			ReadTimeout:       15 * time.Second,
			WriteTimeout:      writeTimeout,
			IdleTimeout:       2 * time.Minute,
			MaxHeaderBytes:    maxHeaders,
			ErrorLog:          slog.NewLogLogger(log.Handler(), slog.LevelDebug),
		},
	}, nil
}

func (l *listener) useTLS(cfg config.TLS) error {
	cert, err := tls.LoadX509KeyPair(cfg.CertFile, cfg.KeyFile)
	if err != nil {
		return fmt.Errorf("load TLS certificate: %w", err)
	}
	auth := tls.NoClientCert
	if cfg.ClientCerts {
		auth = tls.RequestClientCert // of nobody in particular: tokens are bound to thumbprints
	}
	l.Listener = tls.NewListener(l.Listener, &tls.Config{
		ClientAuth: auth, Certificates: []tls.Certificate{cert}, MinVersion: tls.VersionTLS12, NextProtos: []string{"h2", "http/1.1"},
	})
	return nil
}
