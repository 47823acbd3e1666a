// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

// Package prewarm has templates built before anybody asks for them.
//
// [Prewarmer.Run] works in the background, on one template after the other, in this order: those that
// an operator lists, in [Config].Specs and then in [Config].File, and those of the kinds of disks that
// were used within the last week and that an upgrade of the formatter has left without a template, the
// most lately used first. [template.Store.Prewarm] builds each one behind every call that waits for a
// template.
//
// A listed template that cannot be built, or that is gone, is tried again: after a minute, and later
// once an hour. Until then it is a condition that leaves the plugin ready. Listed templates are trimmed
// after all others.
//
// The file has one spec a line, in the spelling of [diskfs.ParseSpec]. What follows a # is a comment. The
// file is looked at every 10 seconds and before each template. A line that is no spec is a condition, and
// the other lines count all the same. While the file cannot be read, what it said last counts.
//
// Caveat: a list of more templates than [template.Config].Budget has room for is never there as a whole.
// The condition says so.
package prewarm
