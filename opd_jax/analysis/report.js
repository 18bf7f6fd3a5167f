"use strict";
// The token viewer. What models wrote is set as text alone, never as markup; without this script the page has the same samples as plain text.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const runs = data.runs.filter((run) => run.steps.length);
  if (!runs.length) return;
  const viewer = document.getElementById("viewer");
  const tip = make("div", { id: "tip", role: "tooltip", hidden: "" });
  let run = runs[0];
  let at = 0;
  let pinned = null; // the token that has the focus

  function make(name, attributes = {}, ...children) {
    const element = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    element.append(...children);
    return element;
  }

  const known = (value) => value !== null && value !== undefined;
  const share = (p) => (p >= 0.001 ? p.toFixed(3) : p.toExponential(1).replace("-", "−"));
  const nats = (value) => (known(value) ? value.toFixed(2).replace("-", "−") + " nats" : "unknown");
  const ratio = (sample, i) => (sample.q && known(sample.q[i]) && known(sample.s[i]) ? sample.q[i] - sample.s[i] : null);
  const shown = (text) => (text === "" ? "(part of a character)" : text.replace(/\n/g, "").replace(/^ +| +$/g, (s) => "␣".repeat(s.length)));

  // ---- tokens

  function colour(element, sample, i) {
    const value = ratio(sample, i);
    if (value !== null) {
      element.classList.add(value < 0 ? "less" : "more");
      element.style.setProperty("--a", Math.min(Math.abs(value) / data.scale, 1).toFixed(2));
    } else if (!sample.q && known(sample.s[i])) {
      element.classList.add("alone");
      element.style.setProperty("--a", Math.min(-sample.s[i] / (2 * data.scale), 1).toFixed(2));
    }
  }

  function token(sample, i) {
    const text = sample.t[i];
    const element = make("span", { class: "token", tabindex: i ? "-1" : "0", role: "button", "data-i": i }, text === "" ? "·" : text);
    if (text === "") element.classList.add("part");
    if (sample.special.includes(i)) element.classList.add("special");
    const value = ratio(sample, i);
    element.setAttribute("aria-label", "token " + shown(text) + (value === null ? "" : ", log-ratio " + nats(value)));
    colour(element, sample, i);
    return element;
  }

  function about(sample, number) {
    if (!sample.t) return `sample ${number}; no values were logged for its tokens`;
    const values = sample.t.map((_, i) => ratio(sample, i)).filter(known);
    const mean = values.length ? `, mean log-ratio ${nats(values.reduce((a, b) => a + b, 0) / values.length)} per token` : "";
    const ended = sample.more ? `; ${sample.more} more` : sample.special.includes(sample.t.length - 1) ? ", stopped" : ", cut off before a stop token";
    return `sample ${number}: ${sample.t.length} tokens${ended}${mean}`;
  }

  function block(sample, number) {
    const element = make("div", { class: "sample", role: "group", "aria-label": `sample ${number}` });
    element.append(make("span", { class: "about" }, about(sample, number)), make("b", {}, sample.prompt));
    if (!sample.t) element.append(sample.text);
    else {
      sample.t.forEach((_, i) => element.append(token(sample, i)));
      if (sample.more) element.append(make("b", {}, ` … ${sample.more} more tokens`));
    }
    element.sample = sample;
    return element;
  }

  // ---- the note beside a token

  function describe(sample, i) {
    const rows = [["student", Math.exp(sample.s[i]), sample.s[i]]];
    if (sample.q) rows.push(["teacher", Math.exp(sample.q[i]), sample.q[i]]);
    const body = make("tbody");
    for (const [name, p, logp] of rows) row(body, `${name} probability`, known(logp) ? share(p) : "unknown");
    if (sample.q) row(body, "log-ratio, log q − log π", nats(ratio(sample, i)));
    row(body, "student entropy", nats(sample.h && sample.h[i]));
    if (sample.g) row(body, "teacher entropy", nats(sample.g[i]));
    const kind = sample.special.includes(i) ? " (special)" : "";
    tip.replaceChildren(make("div", {}, make("code", {}, shown(sample.t[i])), `${kind} · token ${i + 1}`), make("table", {}, body));
    if (sample.top) tip.append(make("p", {}, "the teacher's most probable tokens"), top(sample.top[i]));
  }

  function row(body, name, value) {
    body.append(make("tr", {}, make("th", { scope: "row" }, name), make("td", {}, value)));
  }

  function top(list) {
    const body = make("tbody");
    for (let k = 0; k < list.length; k += 2) {
      const bar = make("i");
      bar.style.width = `${100 * (list[k + 1] || 0)}%`;
      const text = make("th", { scope: "row" }, make("code", {}, shown(run.texts[list[k]])));
      const p = known(list[k + 1]) ? share(list[k + 1]) : "unknown";
      body.append(make("tr", {}, text, make("td", { class: "bar", "aria-hidden": "true" }, bar), make("td", {}, p)));
    }
    return make("table", {}, body);
  }

  function show(element) {
    describe(element.closest(".sample").sample, Number(element.dataset.i));
    tip.hidden = false;
    element.setAttribute("aria-describedby", "tip");
    place(element.getClientRects()[0], tip.offsetWidth, tip.offsetHeight, document.documentElement.clientWidth, innerHeight);
  }

  // Below the token, above it, or where there is no room for either beside it. On a narrow screen the style sheet takes the other half.
  function place(box, width, height, wide, high) {
    const below = box.bottom + 6 + height < high;
    const above = box.top > height + 6;
    const beside = box.right + 12 + width < wide ? box.right + 12 : box.left - width - 12;
    const left = below || above ? Math.min(box.left, wide - width - 8) : beside;
    const top = below ? box.bottom + 6 : above ? box.top - height - 6 : Math.min(box.top, high - height - 6);
    tip.style.left = `${scrollX + Math.max(8, left)}px`;
    tip.style.top = `${scrollY + Math.max(6, top)}px`;
    tip.classList.toggle("high", box.top > high / 2);
  }

  function hide() {
    tip.hidden = true;
    viewer.querySelectorAll("[aria-describedby]").forEach((element) => element.removeAttribute("aria-describedby"));
  }

  const tokenOf = (event) => event.target.closest && event.target.closest(".token");

  function move(event) {
    const element = tokenOf(event);
    if (!element) return;
    const all = [...element.closest(".sample").querySelectorAll(".token")];
    const here = all.indexOf(element);
    const to = { ArrowRight: here + 1, ArrowLeft: here - 1, Home: 0, End: all.length - 1 }[event.key];
    if (event.key === "Escape") hide();
    if (to === undefined || !all[to]) return;
    event.preventDefault();
    element.tabIndex = -1;
    all[to].tabIndex = 0;
    all[to].focus();
  }

  // ---- the controls

  const step = make("input", { type: "range", min: "0", step: "1", "aria-label": "step" });
  const label = make("output", { "aria-live": "polite" });
  const back = make("button", { type: "button", "aria-label": "earlier step" }, "◀");
  const next = make("button", { type: "button", "aria-label": "later step" }, "▶");
  const legend = make("div", { class: "legend" });
  const note = make("p", { class: "quiet" });
  const list = make("div");

  function explain(samples) {
    legend.replaceChildren();
    if (samples.some((sample) => sample.q)) {
      const s = data.scale;
      legend.append("teacher finds it less likely", make("span", {}, `−${s}`), make("i", { class: "ratio" }), make("span", {}, `+${s}`), "more likely than the student (log q − log π, nats; beyond: full colour)");
    } else if (samples.some((sample) => sample.t)) {
      legend.append("No teacher scored these tokens. Colour: the student's own log-probability, 0", make("i", { class: "alone" }), `−${2 * data.scale} nats and below`);
    } else legend.append("No values were logged for these tokens: plain text.");
  }

  function draw() {
    const current = run.steps[at];
    pinned = null;
    hide();
    step.max = run.steps.length - 1;
    step.value = at;
    step.setAttribute("aria-valuetext", `step ${current.step}`);
    label.textContent = `step ${current.step} (${at + 1} of ${run.steps.length})`;
    back.disabled = at === 0;
    next.disabled = at === run.steps.length - 1;
    explain(current.samples);
    note.textContent = run.note;
    note.hidden = !run.note;
    list.replaceChildren(...current.samples.map((sample, i) => block(sample, i + 1)));
  }

  function go(to) {
    at = Math.max(0, Math.min(to, run.steps.length - 1));
    draw();
  }

  const controls = make("div", { class: "controls" });
  if (runs.length > 1) {
    const select = make("select", {}, ...runs.map((one, i) => make("option", { value: i }, one.name)));
    select.addEventListener("change", () => {
      run = runs[select.value];
      go(0);
    });
    controls.append(make("label", {}, "run ", select));
  }
  controls.append(back, step, next, label);
  step.addEventListener("input", () => go(Number(step.value)));
  back.addEventListener("click", () => go(at - 1));
  next.addEventListener("click", () => go(at + 1));
  list.addEventListener("pointerover", (event) => tokenOf(event) && show(tokenOf(event)));
  list.addEventListener("pointerout", (event) => tokenOf(event) && (hide(), pinned && show(pinned)));
  list.addEventListener("focusin", (event) => tokenOf(event) && show((pinned = tokenOf(event))));
  list.addEventListener("focusout", () => ((pinned = null), hide()));
  list.addEventListener("keydown", move);
  const help = "Hover over a token, tap it, or reach it with Tab and the arrow keys: its probabilities, and what a teacher that scored it would have written.";
  viewer.append(controls, legend, make("p", { class: "quiet" }, help), note, list);
  document.body.append(tip);
  draw();
  viewer.hidden = false;
  document.getElementById("plain").hidden = true;
})();
