// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

// Package template picks a volume's template, and builds it if there is none.
//
// A template is a formatted image that nobody writes to. Its name is its key,
//
//	{filesystem}-{MiB}m-{fingerprint}
//
// where the fingerprint covers, by content, everything that decided the image's bytes.
// [Store.Ensure] returns a template open and verified, and builds it first if need be. Clones
// are made from that descriptor, so a template that is removed meanwhile, by [Store.Remove]
// or by hand, is still a whole source.
//
// A template is built once, however many callers in however many processes miss it. The callers
// of one process share a build, and builds of one key wait for each other with a flock. A build
// outlives the call that asked for it: the retry finds it done or joins it.
//
// [Config].Budget bounds the space that templates may take in the pool. The least recently used
// go first. The modification time of a template's lockfile says when it was last used, to within
// an hour.
//
// [Store.Prewarm] builds a template before anybody asks for it, and behind everybody who asks.
// [Store.Retain] has some templates trimmed last. [Store.Outdated] tells which kinds of disks an
// upgrade of the formatter has left without a template.
//
// A template appears in one linkat, whole, verified and durable, or not at all.
//
// A machine that can no longer format, say because mkfs is gone, keeps serving the newest
// template that it has of the wanted content, and says so in its log.
//
// Caveat: this package does not know VMs. The caller passes in the function that formats.
package template
