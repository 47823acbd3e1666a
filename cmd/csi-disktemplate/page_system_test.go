// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

//go:build system

package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/csi-disktemplate/csi-disktemplate/internal/harness"
	"github.com/csi-disktemplate/csi-disktemplate/internal/testenv"
)

// evil is a name that runs a program where it is taken for markup.
const evil = `<img src=x onerror="document.title='evil'"><script>document.title='evil'</script>`

// TestPage looks at the page of a live plugin with volumes, failures, a content that is away and a golden, in light and
// dark, on narrow and on wide screens. A pod with a hostile name is text. When the plugin ends, the page says so, and
// when another one serves, it goes on. With UPDATE=1 in the environment the test writes docs/page.png.
func TestPage(t *testing.T) {
	address := freeAddress(t)
	screen, url := openBrowser(t), "http://"+address+"/"
	b := startBorn(t, testenv.XFS, "contents:\n- {name: away, tar: away.tar, namespaces: [shop]}\n",
		"--page-endpoint", address, "--goldens", "--warm-max", "4")
	web, build := b.mustPublish("web", "ext4", "size", "64Mi"), b.mustPublish("build", "xfs", "size", "320Mi")
	claim := b.claim("database", "")
	snap := b.snapshot(claim, "first")
	b.golden(0, "^Golden shop/cache@1 was made", "promote", "--snapshot", snap, "shop/cache")
	pod := harness.Pod{Namespace: "shop", Name: evil, UID: "hostile"}
	v := b.Inline("hostile", "ext4", pod, map[string]string{"size": "64Mi"})
	if err := v.MakeDirs(); err != nil {
		t.Fatal(err)
	}
	if err := b.client.Publish(t.Context(), v); err != nil {
		t.Fatal(err)
	}
	if _, err := b.publish("greedy", "ext4", "colour", "<b>red</b>"); err == nil {
		t.Error("an unknown attribute was taken")
	}
	if _, err := b.publish("gone", "ext4", "content", "away", "size", "64Mi"); err == nil {
		t.Error("a content that is away was taken")
	}

	for _, scheme := range []string{"light", "dark"} {
		for _, width := range []int{375, 1440} {
			t.Run(fmt.Sprint(scheme, width), func(t *testing.T) {
				screen.open(url, scheme, width)
				screen.isLive()
				if wide := valueIn[int](screen, "document.documentElement.scrollWidth"); wide > width {
					t.Errorf("it is %d pixels wide, on a screen of %d", wide, width)
				}
				ground := valueIn[string](screen, "getComputedStyle(document.body).backgroundColor")
				if dark := ground != "rgb(255, 255, 255)"; dark != (scheme == "dark") {
					t.Errorf("it is on %s", ground)
				}
				screen.isReadable()
			})
		}
	}
	screen.quiet(url)

	// It is live: a volume that goes, a plugin that ends, and another one.
	b.mustUnpublish(v)
	testenv.Eventually(t, "the volume is gone from the page", func() bool {
		return !strings.Contains(screen.text("volumes"), "hostile")
	})
	if os.Getenv("UPDATE") != "" {
		screen.open(url, "light", 1280)
		screen.shows("requests", "NodeUnpublishVolume")
		screen.shows("connection", "live")
		screen.screenshot(filepath.Join("..", "..", "docs", "page.png"))
	}
	b.Kill()
	screen.shows("connection", "connection lost since 20", "what is shown is of then")
	screen.shows("volumes", "shop/web")
	b.again("--page-endpoint", address)
	screen.shows("connection", "live")
	screen.quiet(url)
	// The checks can fail: the policy stops a request to somebody else, and markup made of a string.
	for _, forbidden := range []string{"fetch('https://192.0.2.1/')", "document.body.innerHTML = '<b>x</b>'"} {
		before := screen.complained()
		valueIn[any](screen, fmt.Sprintf("setTimeout(() => { %s }) && 0", forbidden))
		testenv.Eventually(t, "a complaint about "+forbidden, func() bool { return screen.complained() > before })
	}
	b.mustUnpublish(web)
	b.mustUnpublish(build)
	testenv.Eventually(t, "the claim is deleted", func() bool { // a mount namespace of others may have a copy of it
		ctx := t.Context()
		return errors.Join(b.client.Unpublish(ctx, claim), b.client.Unstage(ctx, claim), b.client.Delete(ctx, claim.ID)) == nil
	})
	b.deleteSnapshots(snap)
	screen.shows("snapshots", "There are no snapshots.")
}

// isLive checks that everything is there, with the values that the plugin has, and that what others wrote is text.
func (b *browser) isLive() {
	b.Helper()
	b.shows("connection", "live")
	b.shows("title", "csi.disktemplate.io on node1")
	b.shows("findings", "contents", "degraded", "away.tar: no such file", "do: ", "requirements are met")
	valueIn[any](b, "document.querySelector('#findings summary').click() || 0")
	b.shows("findings", "loop-devices", "good", "a trial volume was attached")
	b.shows("pool", "used: ", "promised and not taken yet: ", "headroom: ", "can still be promised: ", "xfs")
	b.shows("volumes", "shop/web", "shop/build", "shop/"+evil, "database", "64Mi", "320Mi", "published")
	b.shows("snapshots", "first", "ext4", "database")
	b.shows("templates", "ext4-64m-", "xfs-320m-", "there", "mounted ")
	b.shows("contents", "away", "unavailable", "away.tar: no such file")
	b.shows("goldens", "shop/cache", "@1")
	b.shows("requests", "NodePublishVolume", "InvalidArgument", `volume attribute "colour": unknown`)
	b.shows("requests", "CreateSnapshot", "OK")
	if n := valueIn[int](b, "document.querySelectorAll('main img, main b, main script').length"); n != 0 {
		b.Errorf("%d elements were made of names", n)
	}
	if title := valueIn[string](b, "document.title"); title != "node1 – csi.disktemplate.io" {
		b.Errorf("the title is %q", title)
	}
	widths := valueIn[[]float64](b, `[...document.querySelectorAll(".bar span")].map(
		e => e.getBoundingClientRect().width / e.parentElement.clientWidth)`)
	sum := 0.0
	for _, w := range widths {
		sum += w
	}
	if len(widths) != 4 || sum < 0.99 || sum > 1.01 || slices.Min(widths) <= 0 {
		b.Errorf("the parts of the bar are %v of it", widths)
	}
}

// isReadable checks what screen readers and keyboards need, and the contrast of each text with its ground (WCAG 2.2,
// 1.4.3: 4.5).
func (b *browser) isReadable() {
	b.Helper()
	for selector, want := range map[string]bool{
		"header": true, "main": true, "h1": true, "html[lang]": true, "[role=status]": true, "[role=img][aria-label]": true,
		".skip[href='#main']": true, "th[scope=col]": true, "tbody th[scope=row]": true,
		"section:not([aria-labelledby])": false, "table:not([role=table])": false, "th:not([scope])": false,
	} {
		if has := valueIn[int](b, fmt.Sprintf("document.querySelectorAll(%q).length", selector)) > 0; has != want {
			b.Errorf("%s: %v", selector, has)
		}
	}
	for _, low := range valueIn[[]string](b, `(() => {
		const linear = c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
		const light = color => color.match(/[\d.]+/g).slice(0, 3).map(c => linear(c / 255))
			.reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
		const ground = e => {
			const c = getComputedStyle(e).backgroundColor;
			return c === "rgba(0, 0, 0, 0)" && e.parentElement ? ground(e.parentElement) : c;
		};
		const low = new Set();
		for (const e of document.querySelectorAll("h1, h2, p, li, th, td, footer")) {
			if (!e.innerText) continue;
			const of = [light(getComputedStyle(e).color), light(ground(e))].sort((a, b) => b - a);
			const contrast = (of[0] + 0.05) / (of[1] + 0.05);
			if (contrast < 4.5) low.add(e.tagName + "." + e.className + " " + contrast.toFixed(1));
		}
		return [...low];
	})()`) {
		b.Errorf("too little contrast: %s", low)
	}
}
