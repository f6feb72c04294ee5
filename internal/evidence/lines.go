package evidence

import (
	"bufio"
	"errors"
	"fmt"
	"io"
)

// maxLine bounds one line, in bytes: far above what a request can make an entry of.
const maxLine = 8 << 20

var errLong = errors.New("a line is too long to be Writ's")

// lines reads a file line by line, and knows the line after.
type lines struct {
	r *bufio.Reader
	// line and after end with their newline, unless the file ends without one; empty at
	// its end.
	line, after []byte
	err         error // of reading after
}

// newLines stands before the first line.
func newLines(r io.Reader) *lines {
	l := &lines{r: bufio.NewReaderSize(r, 64<<10)}
	_ = l.next() // the line before the first
	return l
}

// next moves on by one line.
func (l *lines) next() error {
	if l.err != nil {
		return l.err
	}
	l.line, l.after = l.after, l.line[:0]
	for {
		part, err := l.r.ReadSlice('\n')
		l.after = append(l.after, part...)
		switch {
		case len(l.after) > maxLine:
			l.after, l.err = nil, errLong
			return nil
		case err == nil || errors.Is(err, io.EOF):
			return nil
		case !errors.Is(err, bufio.ErrBufferFull):
			l.err = fmt.Errorf("read export: %w", err)
			return nil
		}
	}
}
