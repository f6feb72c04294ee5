//go:build unix

package sqlstore

import (
	"fmt"
	"path/filepath"
	"syscall"
)

// writable reports why a database can't be written. Asking is not opening: closing a
// file that was opened would drop the locks that SQLite holds on it in this process.
func writable(path string) error {
	const writeOK = 2 // W_OK of access(2)
	for _, p := range []string{path, filepath.Dir(path)} {
		if err := syscall.Access(p, writeOK); err != nil {
			return fmt.Errorf("write %s: %w", p, err)
		}
	}
	return nil
}
