package main

import (
	"bytes"
	"io"
	"math"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"
)

// TestContent shows that a content is the same each time, and another with another
// seed.
func TestContent(t *testing.T) {
	for name, c := range map[string]content{
		"binary": {binaryForm, 1, 100_000},
		"gzip":   {gzipForm, 1, 100_000},
		"events": {eventForm, 1, int64(100 * eventSize)},
		"empty":  {binaryForm, 1, 0},
	} {
		t.Run(name, func(t *testing.T) {
			first, second := readAll(t, c), readAll(t, c)
			if int64(len(first)) != c.size || !bytes.Equal(first, second) {
				t.Errorf("%d and %d bytes, want the same %d", len(first), len(second), c.size)
			}
			other := c
			other.seed++
			if c.size > 0 && (bytes.Equal(first, readAll(t, other)) || c.digest() == other.digest()) {
				t.Error("another seed makes the same content")
			}
		})
	}
	if got := readAll(t, content{gzipForm, 1, 100}); !bytes.HasPrefix(got, []byte{0x1f, 0x8b}) {
		t.Errorf("%x does not look like gzip", got)
	}
	three := readAll(t, content{eventForm, 1, int64(3 * eventSize)})
	for event := range slices.Chunk(three, len(three)/3) {
		if !bytes.HasPrefix(event, []byte("event: content_block_delta\ndata: {")) || !bytes.HasSuffix(event, []byte("}\n\n")) {
			t.Errorf("%q is no event", event)
		}
	}
}

func readAll(t *testing.T, c content) []byte {
	t.Helper()
	all, err := io.ReadAll(c.reader())
	if err != nil {
		t.Fatal(err)
	}
	return all
}

// TestChecker shows that every kind of damage is found, and a beginning is none.
func TestChecker(t *testing.T) {
	c := content{binaryForm, 7, 10_000}
	right := readAll(t, c)
	changed := func(at int) []byte {
		b := bytes.Clone(right)
		b[at] ^= 1
		return b
	}
	tests := []struct {
		name          string
		body          []byte
		digest        string
		prefix, whole bool
	}{
		{name: "whole", body: right, digest: c.digest(), prefix: true, whole: true},
		{name: "a beginning", body: right[:9_999], digest: c.digest(), prefix: true},
		{name: "nothing", digest: c.digest(), prefix: true},
		{name: "first byte", body: changed(0), digest: c.digest()},
		{name: "a byte in the middle", body: changed(5_000), digest: c.digest()},
		{name: "last byte", body: changed(9_999), digest: c.digest()},
		{name: "a byte too many", body: append(bytes.Clone(right), 0), digest: c.digest()},
		{name: "a byte left out", body: slices.Delete(bytes.Clone(right), 4_000, 4_001), digest: c.digest()},
		{name: "two pieces exchanged", body: slices.Concat(right[5_000:], right[:5_000]), digest: c.digest()},
		{name: "another checksum", body: right, digest: content{binaryForm, 8, 10_000}.digest(), prefix: true},
		{name: "no checksum", body: right, prefix: true},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			for _, piece := range []int{1, 333, 20_000} {
				got := newChecker(c)
				for part := range slices.Chunk(tt.body, piece) {
					got.Write(part)
				}
				if prefix, whole := got.prefix() == nil, got.whole(tt.digest) == nil; prefix != tt.prefix || whole != tt.whole {
					t.Errorf("in pieces of %d: prefix %v, whole %v; want %v, %v", piece, prefix, whole, tt.prefix, tt.whole)
				}
			}
		})
	}
}

// TestPlans shows that all kinds and faults happen, and that a number stands for the
// same request each time.
func TestPlans(t *testing.T) {
	const seed, enough = 3, 20_000
	faults, ofKind := map[fault]int{}, map[kind]int{}
	for number := range enough {
		p := newPlan(seed, number)
		if again := newPlan(seed, number); again != p {
			t.Fatalf("request %d is %+v, and then %+v", number, p, again)
		}
		faults[p.fault]++
		ofKind[p.kind]++
		if limit := max(p.request.size, p.answer.size); p.at < 0 || p.at > 0 && p.at >= limit {
			t.Errorf("%v happens at byte %d of %d", p, p.at, limit)
		}
		if n, err := numberOf(p.path); p.kind != ownEndpoint && (err != nil || n != number) {
			t.Errorf("the number in %s is %d (%v), want %d", p.path, n, err, number)
		}
	}
	for f := range faultCount {
		if faults[f] == 0 {
			t.Errorf("of %d requests none has the fault: %v", enough, f)
		}
	}
	for k := range kinds {
		if share := 100 * ofKind[kind(k)] / enough; share < kinds[k].share-2 || share > kinds[k].share+2 {
			t.Errorf("%d %% of the requests are of kind %v, want %d", share, kind(k), kinds[k].share)
		}
	}
}

// TestFitLine compares fits with ones calculated by hand.
func TestFitLine(t *testing.T) {
	tests := []struct {
		name       string
		x, y       []float64
		slope, err float64
	}{
		{name: "a line", x: []float64{0, 1, 2, 3}, y: []float64{5, 7, 9, 11}, slope: 2, err: 0},
		{name: "flat", x: []float64{0, 1, 2, 3}, y: []float64{4, 4, 4, 4}, slope: 0, err: 0},
		// Sums of squares: 5 of x, 4 of x times y, and 1.8 of what is left.
		{name: "with noise", x: []float64{0, 1, 2, 3}, y: []float64{1, 3, 2, 4}, slope: 0.8, err: math.Sqrt(1.8 / 2 / 5)},
	}
	for _, tt := range tests {
		slope, err := fitLine(tt.x, tt.y)
		if math.Abs(slope-tt.slope) > 1e-9 || math.Abs(err-tt.err) > 1e-9 {
			t.Errorf("%s: %v ± %v, want %v ± %v", tt.name, slope, err, tt.slope, tt.err)
		}
	}
}

// TestGrown shows that a leak is found in noise, and that noise is no leak.
func TestGrown(t *testing.T) {
	const leak = 60.0 // an hour
	r := rand.New(rand.NewPCG(1, 1))
	for range 100 {
		var at []time.Duration
		var flat, leaking []float64
		wander := 0.0
		for second := range 1440 {
			wander += r.NormFloat64() - wander/10 // each second depends on the one before
			at = append(at, time.Duration(second)*time.Second)
			flat = append(flat, 50+wander)
			leaking = append(leaking, 50+wander+leak*at[second].Hours())
		}
		if grown := fitTrend(at, flat, mean).grown(); grown > 2 {
			t.Errorf("noise seems to grow by %.1f", grown)
		}
		if grown := fitTrend(at, leaking, mean).grown(); grown < 15 || grown > 30 {
			t.Errorf("a leak of 24 is found to be %.1f", grown)
		}
	}
}

// TestTrend shows which samples a line is fitted through.
func TestTrend(t *testing.T) {
	q := quantity{of: func(s sample) float64 { return s.rss }, block: mean, settles: 2 * time.Minute}
	var samples []sample
	for second := range 600 {
		s := sample{at: time.Duration(second) * time.Second, rss: 100}
		if s.at < 2*time.Minute {
			s.rss = s.at.Seconds() / 2 // it fills
		}
		samples = append(samples, s)
	}
	if got, ok := q.trend(samples, 10*time.Minute); !ok || got.slope != 0 || got.span != 479*time.Second {
		t.Errorf("%v over %v (%v), want a flat line over what follows the first two minutes", got, got.span, ok)
	}
	if got, ok := q.trend(samples[:120], 2*time.Minute); ok {
		t.Errorf("a run that is too short gives %v", got)
	}
	q.settles = 0
	if got, _ := q.trend(samples, 10*time.Minute); got.span != 479*time.Second {
		t.Errorf("a line over %v, want one over four fifths of the run", got.span)
	}
}

// TestPulse shows when the machine counts as stalled.
func TestPulse(t *testing.T) {
	var p pulse
	start := time.Now()
	second := func(n float64) time.Time { return start.Add(time.Duration(n * float64(time.Second))) }
	p.note(second(0), second(0.1))   // on time
	p.note(second(100), second(101)) // not
	for _, tt := range []struct {
		from, to float64
		want     bool
	}{{0, 1, false}, {90, 96, false}, {90, 98, true}, {100.2, 100.4, true}, {99, 105, true}, {103, 104, true}, {105, 110, false}} {
		if got := p.stalled(second(tt.from), second(tt.to)); got != tt.want {
			t.Errorf("a request from %v to %v s: stalled %v, want %v", tt.from, tt.to, got, tt.want)
		}
	}
}

// TestBadCommandLine covers what is refused.
func TestBadCommandLine(t *testing.T) {
	for _, args := range [][]string{
		{"-for", "9s"}, {"-for", "long"}, {"-seed", "x"}, {"-clients", "1"}, {"-race", "-binary", "proxy"}, {"extra"}, {"-nothing"},
	} {
		var said strings.Builder
		if err := run(t.Context(), args, io.Discard, &said); err != errUsage || said.Len() == 0 {
			t.Errorf("soak %v: %v, and says %q; want %v and why", args, err, said.String(), errUsage)
		}
	}
}
