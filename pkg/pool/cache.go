// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package pool

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/fsctl"
)

// cacheDirs are the directories of a pool that [OpenCache] opens.
var cacheDirs = []string{templatesDir, locksDir, cacheDir}

// OpenCache opens a directory as a pool of templates alone, and makes it if there is none. No
// volume can be made in it, so it may be on any filesystem that has unnamed files and attributes
// of users, and belong to any user. As with [Open], nobody else may write to it. All that is in
// it can be made again: it may be deleted whenever nobody uses it.
//
// Errors are [ErrUnusable] and [ErrFull].
func OpenCache(dir string) (*Pool, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, err
	}
	if err := ownDir(dir); err != nil {
		return nil, Full(err)
	}
	root, err := filepath.EvalSymlinks(dir)
	if err != nil {
		return nil, err
	}
	d, err := os.Open(root)
	if err != nil {
		return nil, err
	}
	// Whoever is not root cannot look below it, so that it has one layer.
	p := &Pool{root: root, dir: d, layers: layers{shared: []bool{false}}, ofUser: true}
	if err := p.furnishCache(); err != nil {
		p.Close()
		return nil, err
	}
	return p, nil
}

func (p *Pool) furnishCache() error {
	st, err := fsctl.StatusOf(p.dir)
	if err != nil {
		return err
	}
	p.id = st.Identity
	for _, name := range cacheDirs {
		if err := p.subdir(name); err != nil {
			return err
		}
	}
	return p.tryTemplate()
}

// tryTemplate makes a file without a name, and gives it the attribute of a template.
func (p *Pool) tryTemplate() error {
	f, err := p.NewTemplate()
	if err == nil {
		defer f.Close()
		err = SetRecord(f, TemplateAttr, struct{}{})
	}
	if err != nil {
		return fmt.Errorf("%w: %s cannot keep templates: %w; choose a directory on btrfs, ext4 or xfs that you may write to",
			ErrUnusable, p.root, err)
	}
	return nil
}

// noteAttr is the attribute of a lockfile that has a note. Only root may have those of the namespace
// trusted.
func (p *Pool) noteAttr(a Attr) Attr {
	if !p.ofUser {
		return a
	}
	return Attr("user." + strings.TrimPrefix(string(a), "trusted."))
}
