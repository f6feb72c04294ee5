package crash

import (
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"unsafe"
)

// tieToUs ends the process with the thread that starts it.
func tieToUs(c *exec.Cmd) {
	c.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setpgid: true}
}

const unlimited = ^uint64(0)

// limitFiles makes writes beyond a size fail in a process: the kernel refuses them as
// those to a full disk.
func limitFiles(t testing.TB, pid int, size uint64) {
	t.Helper()
	limit := syscall.Rlimit{Cur: size, Max: unlimited} // the hard limit, which stays, is checked first
	var old syscall.Rlimit
	_, _, errno := syscall.RawSyscall6(syscall.SYS_PRLIMIT64, uintptr(pid), syscall.RLIMIT_FSIZE, 0, uintptr(unsafe.Pointer(&old)), 0, 0)
	if errno == 0 {
		limit.Max = old.Max
		limit.Cur = min(size, old.Max)
		_, _, errno = syscall.RawSyscall6(syscall.SYS_PRLIMIT64, uintptr(pid), syscall.RLIMIT_FSIZE, uintptr(unsafe.Pointer(&limit)), 0, 0, 0)
	}
	if errno != 0 {
		t.Errorf("limit files: %v", errno)
	}
}

// rss is the memory that a process holds, in bytes.
func rss(pid int) (n int64) {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0
	}
	for l := range strings.Lines(string(data)) {
		if rest, ok := strings.CutPrefix(l, "VmRSS:"); ok {
			_, _ = fmt.Sscan(rest, &n)
		}
	}
	return n << 10
}
