package postgres

import (
	"fmt"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"syscall"
)

// account is the user that the server runs as; nil is our own. PostgreSQL refuses
// to run as root.
type account struct{ uid, gid int }

func unprivileged() *account {
	if os.Geteuid() != 0 {
		return nil
	}
	for _, name := range []string{"postgres", "nobody"} {
		u, err := user.Lookup(name)
		if err != nil {
			continue
		}
		uid, err1 := strconv.Atoi(u.Uid)
		gid, err2 := strconv.Atoi(u.Gid)
		if err1 == nil && err2 == nil && uid > 0 {
			return &account{uid, gid}
		}
	}
	return &account{65534, 65534}
}

func (a *account) apply(c *exec.Cmd) {
	if a != nil {
		c.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uint32(a.uid), Gid: uint32(a.gid)}}
	}
}

// own gives a file or folder to the account.
func (a *account) own(path string) error {
	if a == nil {
		return nil
	}
	return os.Chown(path, a.uid, a.gid)
}

// reach fails unless the account may enter dir, which includes all folders above it.
func (a *account) reach(dir string) error {
	if a == nil {
		return nil
	}
	dir, err := filepath.EvalSymlinks(dir)
	if err != nil {
		return err
	}
	for {
		info, err := os.Stat(dir)
		if err != nil {
			return err
		}
		enter := os.FileMode(0o001)
		if st, ok := info.Sys().(*syscall.Stat_t); ok && int(st.Uid) == a.uid {
			enter = 0o100
		} else if ok && int(st.Gid) == a.gid {
			enter = 0o010
		}
		if info.Mode()&enter == 0 {
			return fmt.Errorf("user %d, as whom PostgreSQL runs, may not enter %s", a.uid, dir)
		}
		if dir == filepath.Dir(dir) {
			return nil
		}
		dir = filepath.Dir(dir)
	}
}
