// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package content

// Described is a content, and what is known of its source.
type Described struct {
	Content
	Digest string // "sha256:…"; empty if it is not known
	// Err is why the source could not be read the last time, or [ErrResolving] while its digest is being found
	// out. An older digest may count all the same.
	Err error
}

// Describe lists all contents in the order of the list. It waits for nothing.
func (c *Contents) Describe() (all []Described) {
	for _, content := range c.list.All() {
		d := Described{Content: content}
		if d.Digest, d.Err = c.digest(content, 0); d.Err == nil && content.Reference != "" {
			d.Err = c.answers.failure(imageKey(content.Reference))
		}
		all = append(all, d)
	}
	return all
}
