// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"encoding/json"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
)

// maxConfig bounds a file with credentials, in bytes, as Kubernetes bounds a Secret.
const maxConfig = 1 << 20

// credentials are what there is for one repository.
type credentials struct {
	dir    string // "" if the operator gave none
	host   string
	auth   authn.Authenticator
	unread []string // what is wrong with files, in words
}

// dockerConfig is the part of docker's config.json that says how to log in.
type dockerConfig struct {
	Auths       map[string]authn.AuthConfig `json:"auths"`
	CredHelpers map[string]string           `json:"credHelpers"`
}

// findCredentials reads all files of a directory and of the directories in it, in the order of their names.
// The first file that has the registry decides. It is read for each pull, so that a Secret that
// changes is noticed.
func findCredentials(dir string, repo name.Repository) (*credentials, error) {
	c := &credentials{dir: dir, host: repo.RegistryStr(), auth: authn.Anonymous}
	if dir == "" {
		return c, nil
	}
	files, err := configFiles(dir)
	if err != nil {
		return nil, fmt.Errorf("%w: %w; check the directory of credentials", ErrReference, err)
	}
	for _, file := range files {
		config, err := readConfig(file)
		if err != nil {
			c.unread = append(c.unread, err.Error())
			continue
		}
		if auth, ok := config.find(repo); ok {
			c.auth = authn.FromConfig(auth)
			return c, nil
		}
		if config.wantsHelper(repo) {
			c.unread = append(c.unread, file+
				" names a credential helper, and no program is started to get credentials: put them in auths")
		}
	}
	return c, nil
}

// configFiles lists the files of a directory and of those in it. Names that begin with ".." are
// kubelet's, for the same files.
func configFiles(dir string) (files []string, err error) {
	dirs, err := visible(dir, func(fi fs.FileInfo) bool { return fi.IsDir() })
	if err != nil {
		return nil, err
	}
	for _, d := range append([]string{dir}, dirs...) {
		found, err := visible(d, func(fi fs.FileInfo) bool { return fi.Mode().IsRegular() })
		if err != nil {
			return nil, err
		}
		files = append(files, found...)
	}
	return files, nil
}

// visible lists the paths in a directory that lead to what is wanted, in order.
func visible(dir string, wanted func(fs.FileInfo) bool) (paths []string, err error) {
	entries, err := os.ReadDir(dir)
	for _, e := range entries {
		path := filepath.Join(dir, e.Name())
		if fi, err := os.Stat(path); err == nil && wanted(fi) && !strings.HasPrefix(e.Name(), "..") {
			paths = append(paths, path)
		}
	}
	return paths, err
}

// readConfig reads one file. Its errors have nothing of the file's content.
func readConfig(path string) (*dockerConfig, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxConfig+1))
	if err != nil {
		return nil, err
	}
	var config dockerConfig
	if len(b) > maxConfig || json.Unmarshal(b, &config) != nil {
		return nil, fmt.Errorf("%s is not a docker config file", path)
	}
	return &config, nil
}

// find returns what a file has for a repository. The longest key that fits decides, as kubelet
// does it: "registry.example/team" is for all repositories below it.
func (c *dockerConfig) find(repo name.Repository) (best authn.AuthConfig, ok bool) {
	longest := -1
	for key, auth := range c.Auths {
		key = registryKey(key)
		if auth != (authn.AuthConfig{}) && covers(key, repo) && len(key) > longest {
			best, ok, longest = auth, true, len(key)
		}
	}
	return best, ok
}

func (c *dockerConfig) wantsHelper(repo name.Repository) bool {
	for key := range c.CredHelpers {
		if covers(registryKey(key), repo) {
			return true
		}
	}
	return false
}

// registryKey is the registry, and perhaps the path, that a key of a config file stands for.
func registryKey(key string) string {
	key = strings.TrimPrefix(strings.TrimPrefix(key, "https://"), "http://")
	for _, version := range []string{"/", "/v1", "/v2"} {
		key = strings.TrimSuffix(key, version)
	}
	if host, path, _ := strings.Cut(key, "/"); host == "docker.io" {
		key = strings.TrimSuffix(name.DefaultRegistry+"/"+path, "/")
	}
	return key
}

func covers(key string, repo name.Repository) bool {
	return key == repo.RegistryStr() || repo.Name() == key || strings.HasPrefix(repo.Name(), key+"/")
}

// remedy says what to do about a registry that denies access.
func (c *credentials) remedy() string {
	var what string
	switch {
	case c.auth != authn.Anonymous:
		what = "check what the credentials for " + c.host + " may pull"
	case c.dir == "":
		what = "the plugin has no credentials; give it a directory of docker config files by --content-credentials"
	default:
		what = "there are no credentials for " + c.host + " in " + c.dir + "; add some"
	}
	return strings.Join(append(c.unread, what), "; ")
}
