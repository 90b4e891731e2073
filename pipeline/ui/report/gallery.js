"use strict";
(() => {
  const samples = JSON.parse(document.getElementById("data").textContent);
  const at = (id) => document.getElementById(id);
  const pickers = { sample: at("sample"), layer: at("layer"), from: at("from"), sinks: at("sinks") };
  const POOLED = "image tokens, head mean", ANSWER = "the whole answer", MEAN = "mean of layers";
  const DARK = 0.4, HEAT = [255, 122, 24];

  const made = (tag, text, name) => {
    const element = document.createElement(tag);
    if (text !== undefined) element.textContent = text;
    if (name) element.className = name;
    return element;
  };

  const bytesOf = (coded) => {
    coded.bytes = coded.bytes || Uint8Array.from(atob(coded.levels), (char) => char.charCodeAt(0));
    return coded.bytes;
  };

  // The mean of some maps of a panel, as numbers.
  const meanOf = (coded, maps, size) => {
    const sum = new Float64Array(size), bytes = bytesOf(coded);
    for (const map of maps)
      for (let n = 0; n < size; n++) sum[n] += bytes[map * size + n] * coded.peaks[map] / 255 / maps.length;
    return sum;
  };

  const boxesOf = (sample) => {
    if (typeof sample.boxes === "string") {
      const edges = new Uint16Array(Uint8Array.from(atob(sample.boxes), (char) => char.charCodeAt(0)).buffer);
      sample.boxes = range(edges.length / 4).map((n) => Array.from(edges.slice(4 * n, 4 * n + 4), (edge) => edge / 65535 * 3 - 1));
    }
    return sample.boxes;
  };

  const range = (count) => Array.from({ length: count }, (_, number) => number);

  // What a panel shows with the pickers as they are; null where it has nothing of the kind.
  const chosenMap = (sample, panel) => {
    const size = boxesOf(sample).length, from = Number(pickers.from.value), layer = Number(pickers.layer.value);
    if (layer >= panel.layers.length) return null;
    const layers = layer < 0 ? range(panel.layers.length) : [layer];
    if (from < 0) return meanOf(pickers.sinks.checked ? panel.pooled : panel.sinks, layers, size);
    if (!panel.words || !sample.words.length) return null;
    const count = sample.words.length, words = from === 0 ? range(count) : [from - 1];
    return meanOf(panel.words, layers.flatMap((one) => words.map((word) => one * count + word)), size);
  };

  const fill = (select, options, keep) => {
    const before = keep ? select.value : undefined;
    select.replaceChildren(...options.map(([value, text]) => {
      const option = made("option", text);
      option.value = value;
      return option;
    }));
    if (options.some(([value]) => String(value) === before)) select.value = before;
  };

  // The map on a grid with cells of about a token's size; a token lies on each cell by the share that it covers.
  const spread = (boxes, map) => {
    const sides = (low, high) => boxes.map((box) => box[high] - box[low]).filter((side) => side > 1e-3).sort((a, b) => a - b);
    const cells = (found) => (found.length ? Math.min(128, Math.max(1, Math.round(1 / found[Math.floor(found.length / 2)]))) : 1);
    const columns = cells(sides(0, 2)), rows = cells(sides(1, 3)), values = new Float64Array(columns * rows);
    const covered = (low, high, cell, count) => Math.max(0, Math.min(high * count, cell + 1) - Math.max(low * count, cell));
    boxes.forEach(([left, top, right, bottom], n) => {
      for (let row = Math.max(0, Math.floor(top * rows)); row < Math.min(rows, bottom * rows); row++)
        for (let column = Math.max(0, Math.floor(left * columns)); column < Math.min(columns, right * columns); column++)
          values[row * columns + column] += map[n] * covered(left, right, column, columns) * covered(top, bottom, row, rows);
    });
    return { columns, rows, values };
  };

  const draw = (canvas, image, sample, map) => {
    const width = 384, height = Math.max(1, Math.round(width / sample.aspect));
    canvas.width = width;
    canvas.height = height;
    const context = canvas.getContext("2d");
    context.imageSmoothingEnabled = !sample.pixels;
    context.drawImage(image, 0, 0, width, height);
    if (!map) return;
    const { columns, rows, values } = spread(boxesOf(sample), map), largest = values.reduce((a, b) => Math.max(a, b), 0) || 1;
    const light = document.createElement("canvas");
    light.width = columns;
    light.height = rows;
    const pixels = new ImageData(columns, rows);
    values.forEach((value, n) => pixels.data.set([...HEAT, Math.round(value / largest * 255)], 4 * n));
    light.getContext("2d").putImageData(pixels, 0, 0);
    // The picture where attention goes, dark elsewhere; then the colour on top of it.
    const lit = document.createElement("canvas");
    lit.width = width;
    lit.height = height;
    const over = lit.getContext("2d");
    over.imageSmoothingQuality = "high";
    over.drawImage(light, 0, 0, width, height);
    over.globalCompositeOperation = "source-in";
    over.imageSmoothingEnabled = !sample.pixels;
    over.drawImage(image, 0, 0, width, height);
    context.fillStyle = `rgba(0, 0, 0, ${1 - DARK})`;
    context.fillRect(0, 0, width, height);
    context.drawImage(lit, 0, 0);
    context.globalAlpha = 0.6;
    context.imageSmoothingEnabled = true;
    context.imageSmoothingQuality = "high";
    context.drawImage(light, 0, 0, width, height);
    context.globalAlpha = 1;
  };

  const described = (sample, map) => {
    const total = map.reduce((a, b) => a + b, 0) || 1;
    const best = map.reduce((found, value, n) => (value > map[found] ? n : found), 0);
    const [left, top, right, bottom] = boxesOf(sample)[best].map((edge) => 50 * edge);
    const place = `most at ${(left + right).toFixed(0)} % of the width and ${(top + bottom).toFixed(0)} % of the height`;
    return { share: `${(100 * map[best] / total).toFixed(1)} % on one token`, place };
  };

  const figure = (name, colour, detail, label) => {
    const box = made("figure"), canvas = made("canvas"), caption = made("figcaption");
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", label);
    if (colour) {
      const dot = document.createElementNS("http://www.w3.org/2000/svg", "svg");
      const circle = document.createElementNS("http://www.w3.org/2000/svg", "circle");
      dot.setAttribute("class", `dot c-${colour}`);
      dot.setAttribute("viewBox", "0 0 12 12");
      for (const [key, value] of [["cx", 6], ["cy", 6], ["r", 5]]) circle.setAttribute(key, value);
      dot.append(circle);
      caption.append(dot, " ");
    }
    caption.append(made("strong", name), made("span", detail, "detail"));
    box.append(canvas, caption);
    return [box, canvas];
  };

  const showAnswers = (sample) => {
    at("answers").replaceChildren(...sample.questions.flatMap((one) => {
      const list = made("ul");
      for (const [model, answer, isRight] of one.answers) {
        const line = made("li");
        line.append(made("strong", model), `: ${answer} `);
        if (isRight !== null) line.append(made("span", isRight ? "\u2713 right" : "\u2717 wrong", isRight ? "right" : "wrong"));
        list.append(line);
      }
      const question = made("p");
      question.append(made("span", "Question", "who"), ` ${one.question}`);
      const parts = [made("h3", one.suite), question];
      if (one.expected) {
        const expected = made("p");
        expected.append(made("span", "Expected", "who"), ` ${one.expected}`);
        parts.push(expected);
      }
      return [...parts, list];
    }));
  };

  const showPickers = (sample) => {
    const most = sample.panels.reduce((found, panel) => (panel.layers.length > found.layers.length ? panel : found));
    fill(pickers.layer, [[-1, MEAN], ...most.layers.map((name, number) => {
      const isSame = sample.panels.every((panel) => panel.layers[number] === name);
      return [number, isSame ? name : `matched pair ${number + 1}`];
    })], true);
    const hasWords = sample.words.length && sample.panels.some((panel) => panel.words);
    const words = hasWords ? [[0, ANSWER], ...sample.words.map((word, number) => [number + 1, `word ${number + 1}: ${word}`])] : [];
    fill(pickers.from, [[-1, POOLED], ...words], true);
  };

  let shown = 0;
  const show = async () => {
    const mine = ++shown, sample = samples[pickers.sample.selectedIndex];
    showPickers(sample);
    const isPooled = Number(pickers.from.value) < 0;
    pickers.sinks.disabled = !isPooled;
    at("question").textContent = sample.question;
    at("answer").textContent = sample.answer;
    const image = new Image();
    image.src = sample.image;
    await image.decode();
    // Another choice may have been made while the picture was read.
    if (mine !== shown) return;
    const [box, canvas] = figure("picture", "", sample.key, `picture of sample ${sample.key}`);
    draw(canvas, image, sample, null);
    const boxes = sample.panels.map((panel) => {
      const map = chosenMap(sample, panel), layer = Number(pickers.layer.value);
      const name = layer < 0 ? MEAN : panel.layers[layer] || "";
      const found = map && described(sample, map);
      const detail = found ? `${name}; ${found.share}` : "not computed for this choice";
      const [each, target] = figure(panel.name, panel.colour, detail, `attention of ${panel.name}: ${found ? found.place : detail}`);
      draw(target, image, sample, map || new Float64Array(boxesOf(sample).length));
      return each;
    });
    at("pictures").replaceChildren(box, ...boxes);
    showAnswers(sample);
    at("said").textContent = `Sample ${pickers.sample.selectedIndex + 1} of ${samples.length}`;
    at("gallery").dataset.shown = mine;
  };

  const step = (by) => {
    pickers.sample.selectedIndex = (pickers.sample.selectedIndex + by + samples.length) % samples.length;
    show();
  };

  fill(pickers.sample, samples.map((sample, number) => [number, `${number + 1} of ${samples.length}: ${sample.question.slice(0, 80)}`]));
  for (const picker of Object.values(pickers)) picker.addEventListener("change", show);
  at("before").addEventListener("click", () => step(-1));
  at("next").addEventListener("click", () => step(1));
  document.addEventListener("keydown", (event) => {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    const target = event.target;
    // Where arrow keys have a meaning already, they keep it: in pickers, and in tables that scroll.
    if (!by || event.altKey || event.ctrlKey || event.metaKey || target.closest("select, input, .scroll")) return;
    event.preventDefault();
    step(by);
  });
  show();
})();
