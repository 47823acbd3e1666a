// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

// Package content has the contents that an operator names, and that volumes can be born with.
//
// A file lists them: see [Content]. It is looked at every 10 seconds. An entry that is wrong is a
// condition, and the others count all the same. While the file cannot be read, what it said last counts.
//
// A content is identified by a digest: that of the bytes of its file, or that of the manifest of its image.
// [Contents.Identity] says it at once, or returns [ErrResolving] while it is found out in the background.
// A file is read once for that, until it changes. A tag is asked for again when somebody wants it and the
// last answer is older than a minute, and meanwhile the last answer counts. Digests are remembered over
// restarts, in a file that can be made again.
//
// [Contents.Prepare] makes one file of a content, for the formatter: plain archives, or a raw disk. It is
// of the digest that was asked for, whatever happened to the source since: every byte that is used is
// hashed once more.
//
// What a namespace may not use does not exist for it: the answer is the same, so that nobody learns which
// contents others have.
//
// Caveats: files are opened in [Config].Dir alone, and must be regular ones: a symbolic link is refused.
// Whoever may write to that directory decides what volumes get. Replace a file by renaming another one: what
// is being read of the old one stays whole.
package content
