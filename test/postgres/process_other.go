//go:build !linux

package postgres

import (
	"os/exec"
	"syscall"
)

func tieToUs(c *exec.Cmd) {
	if c.SysProcAttr == nil {
		c.SysProcAttr = &syscall.SysProcAttr{}
	}
	c.SysProcAttr.Setpgid = true
}

// childrenOf: elsewhere they notice by themselves that the postmaster is gone.
func childrenOf(int) []int { return nil }
