// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

// Package warm keeps volumes ready before anybody asks for them.
//
// A ready volume has no name and no path: an image without a name, and, where pods get a mounted
// filesystem, the loop device that has it and the mount of that, at no path. Only descriptors hold
// these. So whatever ends the plugin, the kernel takes all of it back, and there is nothing to
// sweep. To hand one out takes a record, a name and, for a filesystem, a move of the mount.
//
// A [Kind] is kept once somebody has asked for it. How many of it are ready follows use: the level
// doubles when one was asked for and none was ready, and falls again when they are not needed. All kinds
// together have at most [Config].Most. Kinds that were not used for longest make room for others that
// were asked for twice.
//
// New ones are made one after the other, while no operation on a volume is under way, or one a
// second where that never is so. Nothing is made, and all is given back, where [Config].Room says
// that the node is short of space or memory.
package warm
