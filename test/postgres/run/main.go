// Command run gives one server to a command and all it starts:
//
//	go run ./test/postgres/run [-version N] [-set name=value ...] [-optional] -- go test ./...
//
// The command finds it by [postgres.SharedEnv]. With -optional it runs without one if
// none can be had. Unless -set says otherwise, the server
// is fast rather than safe from a crash of the machine. The exit status is that of the
// command, or 128 and the signal that ended it, as in a shell (go run itself makes 1
// of any failure).
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
	optional := flag.Bool("optional", false, "if no server can be had, say why and run the command without one")
	flag.Parse()
	if flag.NArg() == 0 {
		return 2, errors.New("expected a command")
	}
	// Signals end the start, and later go to the command.
	signals := make(chan os.Signal, 8)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM)
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	s, err := postgres.Start(ctx, o)
	interrupted := ctx.Err() != nil
	stop()
	if err != nil && *optional && !interrupted {
		fmt.Fprintln(os.Stderr, "postgres: none here:", err)
		return command("", signals)
	}
	if err != nil {
		return 1, err
	}
	code, err = command(s.DSN("postgres"), signals)
	if stopped := s.Stop(); stopped != nil {
		return max(code, 1), errors.Join(err, stopped)
	}
	return code, err
}

// command runs what is to be run; dsn may be "".
func command(dsn string, signals <-chan os.Signal) (code int, err error) {
	c := exec.Command(flag.Arg(0), flag.Args()[1:]...)
	c.Stdin, c.Stdout, c.Stderr = os.Stdin, os.Stdout, os.Stderr
	c.Env = os.Environ()
	if dsn != "" {
		c.Env = append(c.Env, postgres.SharedEnv+"="+dsn)
	}
	if err := c.Start(); err != nil {
		return 1, err
	}
	done := make(chan error)
	go func() { done <- c.Wait() }()
	for {
		select {
		case s := <-signals:
			_ = c.Process.Signal(s)
		case err := <-done:
			if err == nil {
				return 0, nil
			}
			exit, ok := errors.AsType[*exec.ExitError](err)
			if !ok {
				return 1, err
			}
			if status, ok := exit.Sys().(syscall.WaitStatus); ok && status.Signaled() {
				return 128 + int(status.Signal()), nil
			}
			return exit.ExitCode(), nil
		}
	}
}
