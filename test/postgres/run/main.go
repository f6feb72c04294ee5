// Command run gives one server to a command and all it starts:
//
//	go run ./test/postgres/run -- go test ./...
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"strings"
	"syscall"

	"github.com/writsec/writ/test/postgres"
)

func main() {
	code, err := run()
	if err != nil {
		fmt.Fprintln(os.Stderr, "postgres:", err)
	}
	os.Exit(code)
}

func run() (code int, err error) {
	o := postgres.Options{Settings: map[string]string{"fsync": "off", "full_page_writes": "off"}}
	flag.IntVar(&o.Version, "version", 0, "major version; 0 is any that fits")
	flag.Func("set", "a setting of the server, name=value", func(s string) error {
		name, value, ok := strings.Cut(s, "=")
		if !ok {
			return errors.New("expected name=value")
		}
		o.Settings[name] = value
		return nil
	})
	flag.Parse()
	if flag.NArg() == 0 {
		return 2, errors.New("expected a command")
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	s, err := postgres.Start(ctx, o)
	if err != nil {
		return 1, err
	}
	defer func() { err = errors.Join(err, s.Stop()) }()
	c := exec.CommandContext(ctx, flag.Arg(0), flag.Args()[1:]...)
	c.Cancel = func() error { return c.Process.Signal(syscall.SIGTERM) }
	c.Stdin, c.Stdout, c.Stderr = os.Stdin, os.Stdout, os.Stderr
	c.Env = append(os.Environ(), postgres.SharedEnv+"="+s.DSN("postgres"))
	err = c.Run()
	if exit, ok := errors.AsType[*exec.ExitError](err); ok {
		return max(exit.ExitCode(), 1), nil
	}
	if err != nil {
		return 1, err
	}
	return 0, nil
}
