// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"crypto/sha256"
	"embed"
	"encoding/hex"
	"io"
	"io/fs"
	"strings"
	"sync"
)

//go:embed *.go
var source embed.FS

// Source returns the SHA-256 of this package's source, in hex, without its tests. It names what
// init does: which commands it runs, in which order, and what it does to the disk besides.
//
// It is the same for every build of that source. The packages that this one imports are left
// out. They read the template, after the kernel was told to refuse writes to it.
var Source = sync.OnceValue(func() string {
	sum, err := sourceDigest(source)
	if err != nil {
		panic(err) // cannot happen: the files are part of this program
	}
	return sum
})

// sourceDigest condenses the names and the content of a package's files, in the order of their
// names.
func sourceDigest(files fs.FS) (string, error) {
	names, err := fs.Glob(files, "*.go")
	if err != nil {
		return "", err
	}
	h := sha256.New()
	for _, name := range names {
		if strings.HasSuffix(name, "_test.go") {
			continue
		}
		b, err := fs.ReadFile(files, name)
		if err != nil {
			return "", err
		}
		sum := sha256.Sum256(b)
		io.WriteString(h, name+"\x00")
		h.Write(sum[:])
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}
