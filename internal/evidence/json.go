package evidence

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"

	jsonv2 "github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
)

// JSON writes JSON in one line, and raw parts of it to the byte: entries are
// proven by their bytes.
func JSON(v any) ([]byte, error) {
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	err := e.Encode(v)
	return bytes.TrimSuffix(b.Bytes(), []byte("\n")), err
}

// canonical restores the bytes of an entry in a document that was reformatted:
// entries are hashed in canonical form (RFC 8785).
func canonical(entry json.RawMessage) json.RawMessage {
	v := jsontext.Value(bytes.Clone(entry))
	if v.Canonicalize() != nil {
		return entry // which then is not proven
	}
	return json.RawMessage(v)
}

// maxDocument bounds what is read into memory, in bytes.
const maxDocument = 1 << 30

// decode reads one JSON document, which two readers can't understand differently.
func decode(r io.Reader, v any) error {
	data, err := io.ReadAll(io.LimitReader(r, maxDocument+1))
	if err == nil && len(data) > maxDocument {
		err = fmt.Errorf("longer than %d bytes", maxDocument)
	}
	if err != nil {
		return err
	}
	return jsonv2.Unmarshal(data, v, jsonv2.RejectUnknownMembers(true))
}
