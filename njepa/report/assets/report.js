// The curves (uPlot) and the maps of likeness. Data come from the page, nothing is loaded.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const colour = (name) =>
    getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  // Curves

  const several = data.runs.length > 1;
  const COLOURS = 6;
  const HEIGHT = matchMedia("(max-width: 600px)").matches ? 190 : 220;
  const drawn = [];

  const digits = (value, n) => {
    const size = Math.abs(value);
    if (size >= 1e5 || (size > 0 && size < 1e-4)) {
      return value.toExponential(Math.max(n - 2, 0)).replace(/\.?0+e/, "e").replace("e+", "e");
    }
    return size >= 1000 ? Math.round(value).toLocaleString("en") : String(+value.toPrecision(n));
  };

  const steps = (value) => {
    if (value >= 1e6) return `${+(value / 1e6).toPrecision(3)}M`;
    return value >= 1e4 ? `${+(value / 1e3).toPrecision(4)}k` : value.toLocaleString("en");
  };

  const axis = (more) => ({
    stroke: () => colour("--soft"),
    grid: { stroke: () => colour("--rail"), width: 1 },
    ticks: { show: false },
    font: "12px system-ui, sans-serif",
    ...more,
  });

  // One run: a colour a curve. Several: a colour a run. A dash a kind of curve, so that what lies
  // behind another one is seen.
  const shade = (series) => (several ? series.run : series.part) % COLOURS;

  function line(series, dots) {
    const number = shade(series);
    const turn = several ? Math.floor(series.run / COLOURS) : 0;
    const dashes = [null, [6, 4], [2, 3]];
    return {
      label: series.label,
      stroke: () => colour(`--c${number}`),
      width: 1.75,
      dash: dashes[(series.part + turn) % dashes.length] || undefined,
      spanGaps: true,
      points: { show: dots, size: 5, fill: () => colour(`--c${number}`) },
      // Without a cursor: the last one.
      value: (_, value, __, at) => {
        const known = at == null ? series.y.findLast((one) => one != null) : value;
        return known == null ? "–" : digits(known, 4);
      },
    };
  }

  const atLeast = (span) => (_, low, high) => {
    const extra = Math.max(0, span - (high - low));
    const bottom = low < 0 ? low - extra / 2 : Math.max(0, low - extra / 2);
    return uPlot.rangeNum(bottom, Math.max(high, bottom + span), 0.1, true);
  };

  // In the legend, by style sheets' own colours: they follow the theme.
  const sample = (number, dash) => (dash
    ? `repeating-linear-gradient(90deg, var(--c${number}) 0 4px, transparent 4px 7px)`
    : `var(--c${number})`);

  function draw(place, chart) {
    const shades = chart.series.map(shade);
    const options = {
      width: place.clientWidth,
      height: HEIGHT,
      scales: {
        x: { time: false },
        y: chart.span ? { range: atLeast(chart.span) } : { distr: chart.log ? 3 : 1 },
      },
      axes: [
        axis({
          values: (_, ticks) => ticks.map(steps), space: 56, size: 26,
          label: "step", labelSize: 16, labelGap: 0, labelFont: "12px system-ui, sans-serif",
        }),
        axis({
          values: (_, ticks) => ticks.map((tick) => (tick == null ? "" : digits(tick, 4))),
          size: 52,
          space: 30,
        }),
      ],
      series: [
        { value: (_, value) => (value == null ? "last" : `step ${value.toLocaleString("en")}`) },
        ...chart.series.map((series) => line(series, chart.dots)),
      ],
      hooks: { ready: [(u) => u.setLegend({ idx: null })] },
      cursor: { sync: { key: "steps" }, points: { size: 6 } },
      legend: { markers: { width: 0, fill: (u, i) => sample(shades[i - 1] ?? 0, u.series[i].dash) } },
    };
    const points = [chart.x, ...chart.series.map((series) => series.y)];
    const plot = new uPlot(options, points, place);
    drawn.push(plot);
    new ResizeObserver(() => {
      if (place.clientWidth && place.clientWidth !== plot.width) {
        plot.setSize({ width: place.clientWidth, height: HEIGHT });
      }
    }).observe(place);
  }

  for (const figure of document.querySelectorAll("[data-chart]")) {
    draw(figure.querySelector(".plot"), data.charts[+figure.dataset.chart]);
  }
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    for (const plot of drawn) plot.redraw(false, true);
  });

  // Likeness to a patch

  function viridis(share) {
    const place = Math.min(Math.max(share, 0), 1) * (data.viridis.length - 1);
    const below = Math.min(Math.floor(place), data.viridis.length - 2);
    return data.viridis[below].map((from, channel) =>
      Math.round(from + (place - below) * (data.viridis[below + 1][channel] - from)));
  }

  function unitRows(packed, width) {
    const bytes = Uint8Array.from(atob(packed), (character) => character.charCodeAt(0));
    const whole = new Int8Array(bytes.buffer);
    const rows = Float32Array.from(whole);
    for (let start = 0; start < rows.length; start += width) {
      const row = rows.subarray(start, start + width);
      const length = Math.sqrt(row.reduce((sum, value) => sum + value * value, 0)) || 1;
      row.forEach((value, i) => { row[i] = value / length; });
    }
    return rows;
  }

  function likeness(panel, features) {
    const { side, images, dimensions: width } = features;
    const patches = side * side;
    const rows = unitRows(features.data, width);
    const maps = [...panel.querySelectorAll(".map")];
    const markers = [...panel.querySelectorAll(".marker")];
    let chosen = { image: 0, patch: 0 };

    function cosines(number) {
      const own = rows.subarray(number * width, (number + 1) * width);
      return Float32Array.from({ length: images * patches }, (_, other) => {
        let sum = 0;
        for (let i = 0; i < width; i++) sum += own[i] * rows[other * width + i];
        return sum;
      });
    }

    function choose(image, patch) {
      chosen = { image, patch };
      const own = image * patches + patch;
      const values = cosines(own);
      const others = values.filter((_, i) => i !== own).sort();
      const low = others[Math.floor(0.01 * others.length)];
      const high = others[others.length - 1];
      maps.forEach((canvas, m) => {
        const context = canvas.getContext("2d");
        const pixels = context.createImageData(side, side);
        for (let i = 0; i < patches; i++) {
          const share = (values[m * patches + i] - low) / Math.max(high - low, 1e-6);
          pixels.data.set([...viridis(share), 255], 4 * i);
        }
        context.putImageData(pixels, 0, 0);
      });
      markers.forEach((marker, m) => {
        const frame = marker.querySelector(".frame");
        frame.hidden = m !== image;
        frame.style.left = `${100 * (patch % side) / side}%`;
        frame.style.top = `${100 * Math.floor(patch / side) / side}%`;
        frame.style.width = frame.style.height = `${100 / side}%`;
      });
      const places = Math.min(5, Math.max(2, 1 - Math.floor(Math.log10(high - low || 1))));
      panel.querySelector(".low").textContent = low.toFixed(places);
      panel.querySelector(".high").textContent = high.toFixed(places);
      panel.querySelector(".chosen").textContent =
        `with image ${image + 1}, row ${Math.floor(patch / side) + 1}, column ${patch % side + 1}`;
    }

    markers.forEach((marker, image) => {
      marker.addEventListener("click", (event) => {
        const box = marker.getBoundingClientRect();
        const cell = (at, from, length) =>
          Math.min(side - 1, Math.max(0, Math.floor(side * (at - from) / length)));
        const row = cell(event.clientY, box.top, box.height);
        choose(image, row * side + cell(event.clientX, box.left, box.width));
      });
      marker.addEventListener("keydown", (event) => {
        const moves = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
        const move = moves[event.key];
        if (!move) return;
        event.preventDefault();
        const from = chosen.image === image ? chosen.patch : 0;
        const within = (value) => Math.min(side - 1, Math.max(0, value));
        choose(image, within(Math.floor(from / side) + move[0]) * side + within(from % side + move[1]));
      });
    });
    choose(0, Math.floor(side / 2) * side + Math.floor(side / 2));
  }

  for (const panel of document.querySelectorAll(".likeness")) {
    likeness(panel, data.features[+panel.dataset.run]);
  }
})();
