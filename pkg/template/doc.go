// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

// Package template decides which template a volume is cloned from, and has it.
//
// A template is a formatted image that nobody writes to, named by its key
//
//	{filesystem}-{MiB}m-{fingerprint}
//
// where the fingerprint covers, by content, everything that decided its bytes.
// [Store.Ensure] returns it, open and verified, making it first if need be.
// Clones are made from that descriptor, so that a template removed meanwhile
// (by [Store.CleanAll], or by hand) still is a whole source.
//
// However many callers in however many processes miss a template, it is built
// once: callers of one process share a build, and builds of one key wait for each
// other with a flock. A build outlives the call that asked for it, and the retry
// finds it done or joins it.
//
// What templates may take of the pool is bounded by [Config].Budget: the least recently
// used go first. When one was used last its lockfile's modification time says, to
// within an hour.
//
// A template appears in one linkat, whole, verified and durable, or not at all.
//
// A machine that can no longer format, say because mkfs is gone, keeps serving
// the newest template it has of the wanted content, and says so in its log.
//
// Caveat: nothing here knows VMs. Formatting is a function that is handed in.
package template
