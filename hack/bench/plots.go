// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"image/color"
	"os"
	"path/filepath"
	"slices"

	"gonum.org/v1/plot"
	"gonum.org/v1/plot/plotter"
	"gonum.org/v1/plot/vg"
	"gonum.org/v1/plot/vg/draw"
	"gonum.org/v1/plot/vg/vgsvg"
)

// colors tell the ways apart also for those who see few colours: Okabe and Ito's palette.
var colors = map[string]color.Color{
	plugin: color.RGBA{0xd5, 0x5e, 0x00, 255}, floor: color.RGBA{0, 0, 0, 255}, floorUUID: color.RGBA{0x88, 0x88, 0x88, 255},
	habit: color.RGBA{0x00, 0x72, 0xb2, 255}, otherHabit: color.RGBA{0x56, 0xb4, 0xe9, 255},
	emptyDir: color.RGBA{0x00, 0x9e, 0x73, 255}, claim: color.RGBA{0xe6, 0x9f, 0x00, 255}, peer: color.RGBA{0xcc, 0x79, 0xa7, 255},
}

// plots writes all plots for which there are samples.
func (b *bench) plots() error {
	return errors.Join(
		b.distributions("publish"), b.distributions("unpublish"),
		b.curves("crowd", "volumes mounted", []string{"publish", "unpublish"}),
		b.curves("claims", "claims", []string{"CreateVolume", "GetCapacity", "ListVolumes"}),
	)
}

// distributions draws which share of the calls had answered after which time: a tile for each pool and filesystem.
func (b *bench) distributions(what string) error {
	var tiles [][]*plot.Plot
	for _, kind := range poolKinds {
		var row []*plot.Plot
		for _, fs := range filesystems {
			p, err := b.distribution(key{Case: "life", Pool: kind.name, FS: fs, What: what})
			if err != nil {
				return err
			}
			if p != nil {
				row = append(row, p)
			}
		}
		if len(row) == len(filesystems) {
			tiles = append(tiles, row)
		}
	}
	return b.save(what, tiles)
}

func (b *bench) distribution(k key) (*plot.Plot, error) {
	p := newPlot(fmt.Sprintf("%s %s, pool %s", k.What, k.FS, k.Pool), "ms", "share of calls")
	p.X.Scale, p.X.Tick.Marker = plot.LogScale{}, plot.LogTicks{Prec: -1}
	p.Y.Min, p.Y.Max = 0, 1
	found := false
	for _, way := range wayNames {
		k.Way = way
		if len(b.samples[k]) == 0 {
			continue
		}
		sorted := slices.Sorted(slices.Values(b.samples[k]))
		points := make(plotter.XYs, len(sorted))
		for i, x := range sorted {
			points[i] = plotter.XY{X: x, Y: float64(i+1) / float64(len(sorted))}
		}
		found = true
		if err := addLine(p, way, points); err != nil {
			return nil, err
		}
	}
	if !found {
		return nil, nil
	}
	p.X.Min, p.X.Max = 0.005, 300 // the same for all, with room for the legend
	return p, nil
}

// curves draws medians against how many volumes there are beside: a tile for each call.
func (b *bench) curves(name, beside string, whats []string) error {
	var row []*plot.Plot
	for _, what := range whats {
		p := newPlot(what, beside, "ms, median")
		p.Y.Min = 0
		found := false
		for _, way := range wayNames {
			points := b.curve(name, what, way)
			if len(points) < 2 {
				continue
			}
			found = true
			if err := addLine(p, way, points); err != nil {
				return err
			}
		}
		if found {
			row = append(row, p)
		}
	}
	if len(row) == 0 {
		return nil
	}
	return b.save(name, [][]*plot.Plot{row})
}

// curve is the medians of the first pool that was measured.
func (b *bench) curve(name, what, way string) (points plotter.XYs) {
	pool := ""
	for _, k := range b.order {
		if k.Case != name || k.What != what || k.Way != way || pool != "" && k.Pool != pool {
			continue
		}
		pool = k.Pool
		points = append(points, plotter.XY{X: float64(k.At), Y: median(b.samples[k])})
	}
	return points
}

func newPlot(title, x, y string) *plot.Plot {
	p := plot.New()
	p.Title.Text, p.X.Label.Text, p.Y.Label.Text = title, x, y
	p.Title.TextStyle.Font.Size, p.Legend.TextStyle.Font.Size = 10, 8
	p.X.Label.TextStyle.Font.Size, p.Y.Label.TextStyle.Font.Size = 9, 9
	p.X.Tick.Label.Font.Size, p.Y.Tick.Label.Font.Size = 8, 8
	p.Legend.Top, p.Legend.Left = true, true
	p.Add(plotter.NewGrid())
	return p
}

func addLine(p *plot.Plot, way string, points plotter.XYs) error {
	line, err := plotter.NewLine(points)
	if err != nil {
		return err
	}
	line.Color, line.Width = colors[way], vg.Points(1.2)
	p.Add(line)
	p.Legend.Add(way, line)
	return nil
}

// save writes tiles as one SVG.
func (b *bench) save(name string, tiles [][]*plot.Plot) error {
	if len(tiles) == 0 {
		return nil
	}
	rows, columns := len(tiles), len(tiles[0])
	canvas := vgsvg.New(vg.Length(columns)*9*vg.Centimeter, vg.Length(rows)*7*vg.Centimeter)
	all := draw.New(canvas)
	all.FillPolygon(color.White, all.ClipPolygonXY([]vg.Point{all.Min, {X: all.Max.X, Y: all.Min.Y}, all.Max, {X: all.Min.X, Y: all.Max.Y}}))
	grid := draw.Tiles{Rows: rows, Cols: columns, PadX: 4 * vg.Millimeter, PadY: 4 * vg.Millimeter, PadTop: 2 * vg.Millimeter, PadRight: 2 * vg.Millimeter}
	canvases := plot.Align(tiles, grid, all)
	for i, row := range tiles {
		for j, p := range row {
			p.Draw(canvases[i][j])
		}
	}
	f, err := os.Create(filepath.Join(b.o.out, name+".svg"))
	if err != nil {
		return err
	}
	_, err = canvas.WriteTo(f)
	return errors.Join(err, f.Close())
}
