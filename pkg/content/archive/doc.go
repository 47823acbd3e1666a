// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

// Package archive decompresses tar archives, checks them, and measures what a filesystem needs to hold
// them. It unpacks nothing: that is done inside the formatting VM.
//
// A [Writer] puts archives into one file, each as a plain tar behind the last one, while it reads their
// headers. Gzip and zstd are known by their first bytes. Blocks of zeros become holes.
//
// An archive is refused if
//   - it is damaged: its compression or a header cannot be read, or the two blocks of zeros at its end are
//     missing, without which nobody can tell a whole archive from one that was cut off;
//   - it is beyond the [Limits], or beyond what Linux allows for a name (255 bytes), a path or the target of a
//     link (4095 bytes), an extended attribute (64 KiB); or a path has more than 256 components;
//   - it has a device, a FIFO or a member of an unknown type;
//   - a path or the target of a hard link has the component "..".
//
// A leading "/" of a path or of a hard link's target is left out, as tar(1) does when it unpacks: many
// archives of whole systems have it, and below the root of a volume it has one meaning only. Set-id bits are
// kept, since volumes are mounted with nosuid. The target of a symbolic link may be anything, since the
// guest follows none while it unpacks.
//
// Caveats: headers are read by [archive/tar], in the guest too, so that both see the same members. Members
// that replace each other, and whiteouts, are counted as if all of them stayed.
//
// Sources: "Basic Tar Format" and "Extensions" in the manual of GNU tar, pax(1p), "Image Layer Filesystem
// Changeset" of the OCI image specification for whiteouts, RFC 1952 and RFC 8878 for the compressions.
package archive
