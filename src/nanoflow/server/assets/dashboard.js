"use strict";
// Reads server-sent events with fetch, since EventSource cannot send the API key, and writes numbers into the page.
const KEPT = 180, events = location.pathname.replace(/\/+$/, "") + "/events";
const get = (id) => document.getElementById(id);
const put = (id, text) => { get(id).textContent = text; };
const LATENCIES = [["first_token_s", "first token"], ["per_output_token_s", "per output token"], ["end_to_end_s", "whole answer"]];
let samples = [], reading = null, pause = 1000;

function number(value, digits = 3) {
  if (value === null || value === undefined) return "–";
  return Number(value.toPrecision(digits)).toLocaleString("en").replaceAll(",", "\u202f");
}

function seconds(value) {
  if (value === null) return "–";
  return value >= 1 ? number(value) + " s" : number(value * 1000) + " ms";
}

function duration(value) {
  const all = Math.round(value), minutes = Math.floor(all / 60), hours = Math.floor(minutes / 60);
  const said = hours ? `${number(hours, 9)} h ${minutes % 60} min` : minutes ? `${minutes} min ${all % 60} s` : `${all} s`;
  return said.replaceAll(" ", "\u00a0");
}

function status(text, kind) {
  put("status", text);
  get("status").className = "status " + kind;
  get("live").classList.toggle("stale", kind !== "live");
}

function meter(element, share) {
  const percent = Math.max(0, Math.min(100, 100 * (share || 0)));
  element.setAttribute("aria-valuenow", percent.toFixed(0));
  element.firstElementChild.style.width = percent + "%";
}

function meters(holder, entries) {
  while (holder.children.length > entries.length) holder.lastChild.remove();
  entries.forEach((entry, index) => {
    let box = holder.children[index];
    if (!box) {
      box = document.createElement("div");
      box.innerHTML = '<div class="row"><span></span><span></span></div><div class="meter" role="meter" aria-valuemin="0" aria-valuemax="100"><i></i></div><p class="soft"></p>';
      holder.append(box);
    }
    const [row, bar, note] = box.children, [name, said] = row.children;
    name.textContent = entry.name;
    said.textContent = entry.said;
    note.textContent = entry.note || "";
    note.hidden = !entry.note;
    bar.className = "meter " + (entry.kind || "");
    bar.setAttribute("aria-label", entry.name);
    meter(bar, entry.share);
  });
}

function plot(id, title, lines, unit) {
  const high = Math.max(1e-9, ...lines.flatMap((line) => line.values.map((v) => v ?? 0)));
  const drawn = lines.map((line) => {
    const runs = [[]];
    line.values.forEach((value, index) => {
      if (value === null) { runs.push([]); return; }
      const x = 1000 * (index + KEPT - line.values.length) / (KEPT - 1);
      runs[runs.length - 1].push(x.toFixed(1) + "," + (98 - 84 * value / high).toFixed(1));
    });
    return runs.filter((run) => run.length).map((run) => `<polyline class="line ${line.kind}" points="${run.join(" ")}"/>`).join("");
  });
  get(id).innerHTML = `<svg viewBox="0 0 1000 100" preserveAspectRatio="none" role="img" aria-label="${title}">` +
    `<line class="base" x1="0" y1="98" x2="1000" y2="98" vector-effect="non-scaling-stroke"/>${drawn.join("")}</svg>` +
    `<div class="row soft"><span>3 min ago</span><span>most: ${number(high)} ${unit}</span><span>now</span></div>`;
}

function hello(found) {
  put("model", found.model);
  document.title = found.model + " · nanoflow dashboard";
  const rates = found.rates;
  put("machine", rates === null ? `the rates of this machine are not known; nanoflow ${found.version}` : `${found.devices > 1 ? found.devices + " × " : ""}${rates.name}, ${rates.dtype}: ${number(rates.flops_per_s / 1e9)} GFLOP/s, ` +
    `${number(rates.mem_bytes_per_s / 1e9)} GB/s ${rates.measured ? "measured" : "published"}; nanoflow ${found.version}`);
  put("pipeline", `${found.pipeline}, ${found.dense_batch} tokens, ${found.nano_ops} nano-operations, ${found.lanes} ${found.lanes === 1 ? "lane" : "lanes"}`);
  get("charts").innerHTML = found.charts.join("");
  put("times", found.times);
}

function show(now) {
  status(now.healthy ? "live" : "the engine takes no requests", now.healthy ? "live" : "bad");
  put("rate", number(now.tokens_per_s));
  put("output-rate", number(now.output_tokens_per_s));
  put("bound-text", now.limit === null ? (now.tokens_per_s ? "the bound is not known" : "no work at the moment") :
    `${number(now.percent_of_bound, 2)} % of the ${now.limit} bound of ${number(now.bound_tokens_per_s)} tokens/s` +
    (now.percent_of_bound > 100 ? ", so this machine's rates were measured too low" : ""));
  meter(get("percent"), now.percent_of_bound / 100);
  put("limit", now.limit ?? (now.tokens_per_s ? "not known" : "none: idle"));
  meters(get("uses"), Object.entries(now.use).map(([name, share]) =>
    ({ name, kind: name, share, said: number(100 * share, 2) + " % of its rate" })));
  put("busy", `A batch was in flight ${number(100 * now.busy, 3)} % of the last ${number(now.window_s, 2)} s.` +
    (now.power_w === null ? "" : ` ${number(now.power_w)} W.`));
  put("batch", number(now.batch_tokens, 5));
  put("batch-of", `of ${now.dense_batch} tokens, newest batch`);
  meter(get("fill"), now.batch_tokens / Math.max(1, now.dense_batch));
  put("iterations", `${number(now.iterations_per_s)} iterations/s`);
  meters(get("kv"), now.kv.map((tier) => ({
    name: tier.name, share: tier.used / Math.max(1, tier.total),
    said: `${number(tier.used, 9)} of ${number(tier.total, 9)} pages`,
  })));
  const hits = Object.entries(now.kv_hit_tokens).filter(([, count]) => count).map(([tier, count]) => `${number(count, 9)} from ${tier}`);
  put("kv-reuse", `${number(now.kv_pages_cached, 9)} unused pages of the device are kept for reuse. ` +
    (hits.length ? `Prompt tokens found, not computed: ${hits.join(", ")}.` : "No prompt token was found there yet."));
  put("running", number(now.running, 9));
  put("waiting", number(now.waiting, 9));
  const ended = Object.entries(now.finished).map(([reason, count]) => `${number(count, 9)} ${reason}`).join(", ") || "none";
  put("finished", `Ended so far: ${ended}; ${number(now.preemptions, 9)} preemptions.`);
  get("latency").innerHTML = LATENCIES.map(([key, name]) => {
    const found = now.latency[key];
    return `<tr><th scope="row">${name}</th>` + ["p50", "p90", "p99"].map((q) => `<td>${seconds(found[q])}</td>`).join("") + "</tr>";
  }).join("");
  batches(now.batches);
  put("latency-window", `${number(now.latency.end_to_end_s.count, 9)} choices ended in the last ${number(now.latency_window_s, 2)} s.`);
}

function batches(found) {
  get("batches-card").hidden = !found.running.length && !found.waiting;
  meters(get("batches"), found.running.map((batch) => {
    const read = batch.total !== null, share = read ? batch.done / Math.max(1, batch.total) : 0;
    const left = batch.seconds_left === null ? "" : `, about\u00a0${duration(batch.seconds_left)}\u00a0left`;
    return {
      name: batch.name, share, said: read ? `${Math.floor(100 * share)}\u00a0%${left}` : "its file is being read",
      note: !read ? batch.id : `${number(batch.done, 9)} of ${number(batch.total, 9)} requests done, ${number(batch.failed, 9)} failed; ` +
        `${number(batch.prompt_tokens, 9)} tokens in, ${number(batch.output_tokens, 9)} out; ${batch.id}`,
    };
  }));
  const waiting = found.waiting === 1 ? "1 batch waits" : `${number(found.waiting, 9)} batches wait`;
  put("batches-waiting", found.waiting ? waiting + (found.running.length ? " behind it." : ".") : "");
  get("batches-waiting").hidden = !found.waiting;
}

function charts() {
  plot("rate-chart", "tokens per second and the bound over the last three minutes", [
    { kind: "ours", values: samples.map((s) => s.tokens_per_s) },
    { kind: "bound", values: samples.map((s) => s.bound_tokens_per_s) }], "tokens/s");
  plot("queue-chart", "running and waiting choices over the last three minutes", [
    { kind: "ours", values: samples.map((s) => s.running) },
    { kind: "memory", values: samples.map((s) => s.waiting) }], "choices");
}

function take(name, data) {
  if (name === "hello") { hello(data); return; }
  if (name === "history") samples = data;
  if (name === "sample") samples.push(data);
  samples = samples.slice(-KEPT);
  if (samples.length) { show(samples[samples.length - 1]); charts(); }
}

async function read(signal) {
  const key = sessionStorage.getItem("nanoflow-key");
  const answer = await fetch(events, { headers: key ? { Authorization: "Bearer " + key } : {}, signal, cache: "no-store" });
  if (answer.status === 401) {
    get("ask").hidden = false;
    status(key ? "the server refuses this key" : "a key is needed", "bad");
    return false;
  }
  if (!answer.ok) throw new Error("the server answered " + answer.status);
  get("ask").hidden = true;
  pause = 1000;
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let text = ""; ;) {
    const { done, value } = await reader.read();
    if (done) return true;
    const parts = (text + value).split("\n\n");
    text = parts.pop();
    for (const part of parts) {
      const [first, second] = part.split("\n");
      take(first.slice(7), JSON.parse(second.slice(6)));
    }
  }
}

async function watch() {
  if (reading || document.hidden) return;
  const mine = reading = new AbortController();
  try {
    while (await read(mine.signal)) await again("the server has closed the stream");
  } catch (error) {
    if (mine.signal.aborted) return;
    await again(String(error.message || error));
    if (reading === mine) reading = null;
    watch();
    return;
  }
  if (reading === mine) reading = null;
}

async function again(why) {
  status(why + "; trying again", "bad");
  await new Promise((wake) => setTimeout(wake, pause));
  pause = Math.min(2 * pause, 15000);
}

document.addEventListener("visibilitychange", () => {  // a hidden page costs the server nothing
  if (document.hidden && reading) { reading.abort(); reading = null; status("paused", ""); }
  else watch();
});
get("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("nanoflow-key", get("key").value);
  watch();
});
watch();
