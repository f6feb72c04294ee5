package sqlstore

import (
	"os"
	"testing"

	"github.com/writsec/writ/internal/storetest"
)

func TestMain(m *testing.M) { os.Exit(storetest.Main(m)) }
