// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"math/rand/v2"
	"slices"
)

// quantile returns the value below which a share q of the sorted samples lies, interpolated.
func quantile(sorted []float64, q float64) float64 {
	if len(sorted) == 0 {
		return 0
	}
	at := q * float64(len(sorted)-1)
	i := int(at)
	if i+1 == len(sorted) {
		return sorted[i]
	}
	return sorted[i] + (at-float64(i))*(sorted[i+1]-sorted[i])
}

func median(samples []float64) float64 { return quantile(slices.Sorted(slices.Values(samples)), 0.5) }

// ratio is a ratio of two medians, or other quantiles, and how far it can be trusted.
type ratio struct {
	Value float64 `json:"value"`
	// Low and High are between what 90% of the ratios are that the same measurement could as well have given: the
	// bootstrap, of samples drawn again with replacement.
	Low  float64 `json:"low"`
	High float64 `json:"high"`
}

// resamples is enough for two digits of the bounds.
const resamples = 500

// ratioOf compares what two functions make of two sets of samples.
func ratioOf(of, to []float64, valueOf, valueTo func([]float64) float64) ratio {
	r := rand.New(rand.NewPCG(1, 2)) // the same numbers give the same bounds
	draw := func(from []float64, value func([]float64) float64) float64 {
		drawn := make([]float64, len(from))
		for i := range drawn {
			drawn[i] = from[r.IntN(len(from))]
		}
		return value(drawn)
	}
	ratios := make([]float64, resamples)
	for i := range ratios {
		ratios[i] = draw(of, valueOf) / draw(to, valueTo)
	}
	slices.Sort(ratios)
	return ratio{valueOf(of) / valueTo(to), quantile(ratios, 0.05), quantile(ratios, 0.95)}
}
