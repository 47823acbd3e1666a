// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

//go:build system

package main

import (
	"bufio"
	"bytes"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"image"
	"image/color"
	"image/draw"
	"image/png"
	"io"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/csi-disktemplate/csi-disktemplate/internal/testenv"
)

// browser is a Chromium with one page. It speaks the Chrome DevTools Protocol through two pipes: each message is JSON,
// and ends with a zero byte (content/browser/devtools/devtools_pipe_handler.cc).
type browser struct {
	*testing.T
	commands io.Writer
	session  string
	last     int

	mu      sync.Mutex
	answers map[int]chan message
	// requested are the URLs that the page asked for, and complaints what its console has but for lost connections.
	requested, complaints []string
}

// message is a command, an answer or an event.
type message struct {
	ID      int             `json:"id,omitempty"`
	Session string          `json:"sessionId,omitempty"`
	Method  string          `json:"method,omitempty"`
	Params  any             `json:"params,omitempty"`
	Result  json.RawMessage `json:"result,omitempty"`
	Error   *struct {
		Message string
	} `json:"error,omitempty"`
}

// openBrowser starts a browser with an empty page.
func openBrowser(t *testing.T) *browser {
	t.Helper()
	toBrowser, commands, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	answers, fromBrowser, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	var log strings.Builder
	cmd := exec.Command(findBrowser(t), "--headless", "--remote-debugging-pipe", "--user-data-dir="+t.TempDir(),
		"--no-sandbox", // which root cannot have
		"--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars",
		"--no-first-run", "--disable-background-networking", "--disable-component-update", "about:blank")
	cmd.ExtraFiles, cmd.Stderr = []*os.File{toBrowser, fromBrowser}, &log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	toBrowser.Close()
	fromBrowser.Close()
	b := &browser{T: t, commands: commands, answers: map[int]chan message{}}
	read := make(chan struct{})
	go func() {
		b.read(answers)
		close(read)
	}()
	t.Cleanup(func() {
		b.command("Browser.close", nil)
		commands.Close()
		if err := cmd.Wait(); err != nil {
			t.Errorf("chromium: %v: %s", err, &log)
		}
		<-read
		answers.Close()
	})
	var target struct{ TargetID string }
	b.must("Target.createTarget", map[string]any{"url": "about:blank"}, &target)
	var attached struct{ SessionID string }
	b.must("Target.attachToTarget", map[string]any{"targetId": target.TargetID, "flatten": true}, &attached)
	b.session = attached.SessionID
	for _, domain := range []string{"Page", "Runtime", "Log", "Network"} {
		b.must(domain+".enable", nil, nil)
	}
	return b
}

// findBrowser returns the name of a Chromium that is installed, as hack/setup.sh looks for it.
func findBrowser(t *testing.T) string {
	t.Helper()
	for _, name := range []string{"chromium", "chromium-browser", "google-chrome"} {
		if path, err := exec.LookPath(name); err == nil {
			return path
		}
	}
	t.Fatal("there is no Chromium; `make setup` installs one")
	return ""
}

// read handles what the browser sends, until it ends.
func (b *browser) read(from io.Reader) {
	r := bufio.NewReader(from)
	for {
		line, err := r.ReadBytes(0)
		if err != nil {
			return
		}
		var m message
		if err := json.Unmarshal(line[:len(line)-1], &m); err != nil {
			b.Errorf("%v: %.300s", err, line)
			continue
		}
		b.mu.Lock()
		if answer := b.answers[m.ID]; answer != nil {
			answer <- m
			delete(b.answers, m.ID)
		} else {
			b.event(m, string(line))
		}
		b.mu.Unlock()
	}
}

// event keeps what a test wants to know.
func (b *browser) event(m message, text string) {
	switch m.Method {
	case "Network.requestWillBeSent":
		request := m.Params.(map[string]any)["request"].(map[string]any)
		b.requested = append(b.requested, request["url"].(string))
	case "Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded":
		if !strings.Contains(text, "ERR_CONNECTION_REFUSED") {
			b.complaints = append(b.complaints, text)
		}
	}
}

// command sends a command, and waits for its answer.
func (b *browser) command(method string, params any) (message, error) {
	b.last++
	answer := make(chan message, 1)
	b.mu.Lock()
	b.answers[b.last] = answer
	b.mu.Unlock()
	text, err := json.Marshal(message{ID: b.last, Session: b.session, Method: method, Params: params})
	if err != nil {
		return message{}, err
	}
	if _, err := b.commands.Write(append(text, 0)); err != nil {
		return message{}, err
	}
	select {
	case m := <-answer:
		if m.Error != nil {
			return m, fmt.Errorf("%s: %s", method, m.Error.Message)
		}
		return m, nil
	case <-time.After(time.Minute):
		return message{}, fmt.Errorf("%s: no answer", method)
	}
}

func (b *browser) must(method string, params, result any) {
	b.Helper()
	m, err := b.command(method, params)
	if err == nil && result != nil {
		err = json.Unmarshal(m.Result, result)
	}
	if err != nil {
		b.Fatal(err)
	}
}

// open loads a page as on a screen of a width, in light or dark.
func (b *browser) open(url, scheme string, width int) {
	b.Helper()
	type values = map[string]any
	screen := values{"width": width, "height": 1200, "deviceScaleFactor": 1, "mobile": false}
	b.must("Emulation.setDeviceMetricsOverride", screen, nil)
	feature := values{"name": "prefers-color-scheme", "value": scheme}
	b.must("Emulation.setEmulatedMedia", values{"features": []values{feature}}, nil)
	b.must("Page.navigate", values{"url": url}, nil)
}

// valueIn is that of an expression in the page, as JSON.
func valueIn[T any](b *browser, expression string) (v T) {
	b.Helper()
	var r struct {
		Result           struct{ Value json.RawMessage }
		ExceptionDetails json.RawMessage
	}
	command := map[string]any{"expression": "JSON.stringify(" + expression + ")", "returnByValue": true}
	b.must("Runtime.evaluate", command, &r)
	var text string
	if err := json.Unmarshal(r.Result.Value, &text); err != nil {
		b.Fatalf("%s: %v: %s", expression, err, r.ExceptionDetails)
	}
	if err := json.Unmarshal([]byte(text), &v); err != nil {
		b.Fatalf("%s: %v: %s", expression, err, text)
	}
	return v
}

// text is what an element shows.
func (b *browser) text(id string) string {
	b.Helper()
	return valueIn[string](b, fmt.Sprintf("(document.getElementById(%q) || {innerText: ''}).innerText", id))
}

// shows waits until an element shows each of some texts.
func (b *browser) shows(id string, texts ...string) {
	b.Helper()
	testenv.Eventually(b.T, fmt.Sprintf("#%s shows %q", id, texts), func() bool { return contains(b.text(id), texts) })
}

// quiet checks that the page asked nobody but its own host, and that its console is empty.
func (b *browser) quiet(url string) {
	b.Helper()
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, complaint := range b.complaints {
		b.Errorf("the console has %s", complaint)
	}
	ours := func(u string) bool { return strings.HasPrefix(u, url) || u == "data:," }
	if i := slices.IndexFunc(b.requested, func(u string) bool { return !ours(u) }); i >= 0 || len(b.requested) < 8 {
		b.Errorf("the page asked for %q", b.requested)
	}
}

// complained counts what the console has.
func (b *browser) complained() int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return len(b.complaints)
}

// screenshot writes what the page looks like, as PNG with 256 colours, which takes a third of the space.
func (b *browser) screenshot(path string) {
	b.Helper()
	var shot struct{ Data string }
	b.must("Page.captureScreenshot", map[string]any{"format": "png", "captureBeyondViewport": false}, &shot)
	screen, err := png.Decode(base64.NewDecoder(base64.StdEncoding, strings.NewReader(shot.Data)))
	if err != nil {
		b.Fatal(err)
	}
	few := image.NewPaletted(screen.Bounds(), commonest(screen))
	draw.Draw(few, few.Bounds(), screen, screen.Bounds().Min, draw.Src)
	var file bytes.Buffer
	if err := (&png.Encoder{CompressionLevel: png.BestCompression}).Encode(&file, few); err != nil {
		b.Fatal(err)
	}
	if file.Len() > 200<<10 {
		b.Errorf("the screenshot has %d bytes", file.Len())
	}
	if err := os.WriteFile(path, file.Bytes(), 0o644); err != nil {
		b.Fatal(err)
	}
}

// commonest are the 256 commonest colours of an image.
func commonest(of image.Image) (all color.Palette) {
	count := map[color.Color]int{}
	for y := range of.Bounds().Dy() {
		for x := range of.Bounds().Dx() {
			count[of.At(x, y)]++
		}
	}
	for c := range count {
		all = append(all, c)
	}
	slices.SortFunc(all, func(a, b color.Color) int { return count[b] - count[a] })
	return all[:min(len(all), 256)]
}
