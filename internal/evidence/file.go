package evidence

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
)

// WriteFile writes a file of the owner's alone that has its name only once it is
// whole and on the disk, in the place of an older one.
func WriteFile(path string, write func(io.Writer) error) error {
	d, err := newDraft(path)
	if err != nil {
		return err
	}
	defer d.discard()
	if err := d.fill(write); err != nil {
		return err
	}
	if err := os.Rename(d.temp, path); err != nil {
		return fmt.Errorf("write file: %w", err)
	}
	return syncFolder(path)
}

// draft is a file that has no name yet.
type draft struct {
	file       *os.File
	temp, path string
}

func newDraft(path string) (*draft, error) {
	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".*") // 0600
	if err != nil {
		return nil, fmt.Errorf("write file: %w", err)
	}
	return &draft{f, f.Name(), path}, nil
}

// fill writes all of it to the disk.
func (d *draft) fill(write func(io.Writer) error) error {
	b := bufio.NewWriterSize(d.file, 64<<10)
	if err := write(b); err != nil {
		return err
	}
	if err := errors.Join(b.Flush(), d.file.Sync()); err != nil {
		return fmt.Errorf("write file: %w", err)
	}
	return nil
}

// publish names it, which fails where there is a file of that name.
func (d *draft) publish() error {
	if err := os.Link(d.temp, d.path); err != nil {
		return fmt.Errorf("write file: %w", err)
	}
	return syncFolder(d.path)
}

// discard removes what has no name.
func (d *draft) discard() {
	_ = d.file.Close()
	_ = os.Remove(d.temp)
}

// syncFolder makes the name of a file survive a power loss.
func syncFolder(path string) error {
	f, err := os.Open(filepath.Dir(path))
	if err != nil {
		return fmt.Errorf("write file: %w", err)
	}
	defer func() { _ = f.Close() }()
	if err := f.Sync(); err != nil {
		return fmt.Errorf("write file: %w", err)
	}
	return nil
}
