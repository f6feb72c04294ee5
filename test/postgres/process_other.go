//go:build !linux

package postgres

import (
	"fmt"
	"os/exec"
	"strings"
	"syscall"
)

func tieToUs(c *exec.Cmd) {
	if c.SysProcAttr == nil {
		c.SysProcAttr = &syscall.SysProcAttr{}
	}
	c.SysProcAttr.Setpgid = true
}

// watch makes the server quit when we are gone: a shell waits for the end of a pipe
// that only we hold.
func watch(pid int) (release func()) {
	c := exec.Command("/bin/sh", "-c", fmt.Sprintf("read _; kill -QUIT %d", pid))
	c.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	pipe, err := c.StdinPipe()
	if err != nil || c.Start() != nil {
		return func() {} // the server may outlive us then
	}
	return func() {
		_ = c.Process.Kill() // before the pipe ends, since pid may be another's by now
		_ = pipe.Close()
		_ = c.Wait()
	}
}

func childrenOf(parent int) (out []int) {
	list, _ := exec.Command("ps", "-A", "-o", "pid=,ppid=").Output()
	for line := range strings.Lines(string(list)) {
		var pid, ppid int
		if n, _ := fmt.Sscan(line, &pid, &ppid); n == 2 && ppid == parent {
			out = append(out, pid)
		}
	}
	return out
}

func alive(pid int) bool { return syscall.Kill(pid, 0) == nil }
