// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// programs are PostgreSQL's, and the user as whom they run: as root they refuse to.
type programs struct {
	dir      string
	uid, gid int
}

// findPostgres finds the programs and the user.
func findPostgres() (p programs, err error) {
	u, err := user.Lookup("postgres")
	if err != nil {
		return p, fmt.Errorf("%w: %w", errMissing, err)
	}
	if p.uid, err = strconv.Atoi(u.Uid); err != nil {
		return p, err
	}
	if p.gid, err = strconv.Atoi(u.Gid); err != nil {
		return p, err
	}
	p.dir, err = postgresDir()
	return p, err
}

// postgresDir is where the programs of the newest version are: Debian has a directory for each. Elsewhere PATH has them.
func postgresDir() (string, error) {
	if found, _ := filepath.Glob("/usr/lib/postgresql/*/bin/initdb"); len(found) > 0 {
		return filepath.Dir(slices.Max(found)), nil
	}
	at, err := exec.LookPath("initdb")
	if err != nil {
		return "", fmt.Errorf("%w: %w", errMissing, err)
	}
	return filepath.Dir(at), nil
}

func (p programs) path(name string) string { return filepath.Join(p.dir, name) }

// own makes a directory of that user.
func (p programs) own(dir string) error {
	if err := os.Mkdir(dir, 0o700); err != nil {
		return err
	}
	return os.Chown(dir, p.uid, p.gid)
}

// command is one of the programs. The directories above a volume are root's alone, as kubelet's are, so the program gets
// the capability to go through them: capabilities(7).
func (p programs) command(ctx context.Context, name string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, p.path(name), args...)
	cmd.Dir = "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Credential:  &syscall.Credential{Uid: uint32(p.uid), Gid: uint32(p.gid)},
		AmbientCaps: []uintptr{unix.CAP_DAC_READ_SEARCH},
		Pdeathsig:   syscall.SIGQUIT,
		Setpgid:     true,
	}
	return cmd
}

// initdb makes a database cluster in an empty directory.
func (p programs) initdb(ctx context.Context, dir string) error {
	cmd := p.command(ctx, "initdb", "--pgdata="+dir, "--username=postgres", "--auth=trust", "--no-locale", "--encoding=UTF8")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("initdb: %w\n%s", err, out)
	}
	return nil
}

// dataDir is where the database of a volume is.
func dataDir(v *volume) string { return filepath.Join(v.target, "data") }

// server is a database server in a volume.
type server struct {
	programs
	socket string // the directory that its socket is in
	suite  string // a script: see the function suite
	cmd    *exec.Cmd
	log    bytes.Buffer
}

// serve starts a server and fills its database. It has PostgreSQL's defaults, but nothing works on a turn of another:
// autovacuum is off. A path below the volume would be too long for a socket: unix(7).
func (p programs) serve(ctx context.Context, dir string, v *volume) (*server, error) {
	s := &server{programs: p, socket: filepath.Join(dir, v.id)}
	s.suite = filepath.Join(s.socket, "suite.sql")
	if err := p.own(s.socket); err != nil {
		return nil, err
	}
	if err := os.WriteFile(s.suite, []byte(suite(pgTests)), 0o644); err != nil {
		return nil, err
	}
	s.cmd = p.command(context.WithoutCancel(ctx), "postgres", // stop ends it
		"-D", dataDir(v), "-k", s.socket, "-c", "listen_addresses=", "-c", "autovacuum=off")
	s.cmd.Stderr = &s.log
	if err := s.cmd.Start(); err != nil {
		return nil, err
	}
	err := s.ready(ctx)
	if err == nil {
		err = s.fill(ctx)
	}
	if err != nil {
		return nil, fmt.Errorf("%w\n%s", errors.Join(err, s.stop()), s.log.Bytes())
	}
	return s, nil
}

// ready waits until the server answers.
func (s *server) ready(ctx context.Context) error {
	for end := time.Now().Add(stopTimeout); ; time.Sleep(10 * pause) {
		_, err := run(ctx, s.path("pg_isready"), "--quiet", "--host="+s.socket)
		if err == nil || time.Now().After(end) || ctx.Err() != nil {
			return err
		}
	}
}

// fill makes pgbench's tables.
func (s *server) fill(ctx context.Context) error {
	_, err := run(ctx, s.path("pgbench"), "--host="+s.socket, "--username=postgres", "--initialize", "--quiet",
		fmt.Sprintf("--scale=%d", pgScale), "postgres")
	if err != nil {
		return err
	}
	return s.psql(ctx, "--command=CHECKPOINT") // so that the first turn begins as the others do
}

// pgbench returns the transactions a second.
func (s *server) pgbench(ctx context.Context) (float64, error) {
	out, err := run(ctx, s.path("pgbench"), "--host="+s.socket, "--username=postgres", "--no-vacuum",
		fmt.Sprintf("--client=%d", pgClients), "--time=1", "postgres")
	if err != nil {
		return 0, err
	}
	return transactions(out)
}

// tps is where pgbench(1) says how many transactions a second there were.
var tps = regexp.MustCompile(`(?m)^tps = ([0-9.]+) `)

// transactions finds the rate in pgbench's report.
func transactions(out string) (float64, error) {
	m := tps.FindStringSubmatch(out)
	if m == nil {
		return 0, fmt.Errorf("pgbench's report is not understood: %.200s", out)
	}
	return strconv.ParseFloat(m[1], 64)
}

// psql runs a script on the server, without the user's own settings.
func (s *server) psql(ctx context.Context, script string) error {
	_, err := run(ctx, s.path("psql"), "--no-psqlrc", "--quiet", "--output=/dev/null", "--set=ON_ERROR_STOP=1",
		"--host="+s.socket, "--username=postgres", script, "postgres")
	return err
}

// stop ends the server at once, and its processes. What it has is about to be deleted: pg_ctl(1), mode immediate.
func (s *server) stop() error {
	if s == nil {
		return nil
	}
	if err := s.cmd.Process.Signal(syscall.SIGQUIT); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	s.cmd.Wait() // its error says no more than that the server did not end in order
	return os.RemoveAll(s.socket)
}
