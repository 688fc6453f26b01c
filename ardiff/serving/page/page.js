// The web page of the service: requests a video, plays it while it is generated, and shows the progress of its schedule.
"use strict";

const $ = (id) => document.getElementById(id);
const NUMBERS = ["num_frames", "num_inference_steps", "ar_step", "guidance_scale", "seed"];
const TEXTS = ["prompt", "negative_prompt"];
const LABELS = {
  prompt: "Prompt", negative_prompt: "Negative prompt", class_label: "Class", size: "Size", num_frames: "Frames",
  num_inference_steps: "Steps per frame", ar_step: "ar_step", guidance_scale: "Guidance", seed: "Seed",
  input_reference: "The picture or clip",
};
const MAX_SHOWN = 200; // characters of a text in the history
const MAX_TRIES = 60; // to continue a broken stream, one in a second
const CHANGE_WORDS = { pending: "The change waits.", not_applied: "Too late: every frame has begun." };
const ACTIVE = ["queued", "in_progress"];
let models = [];
let current = null; // state of the shown video
let playing = null; // AbortController of the playing stream
let shown = 0; // number of the shown video: loops of earlier ones end
let broken = false; // whether the playing stream ended early
let defaultSteps = 50; // steps per frame of the chosen model, unless the user chooses others
let defaultArStep = 5;
let wantedArStep = 5; // as chosen with the slider, also while other fields do not allow it

class ServiceError extends Error {
  constructor(message, param, status) {
    super(message);
    this.param = param;
    this.status = status;
  }
}

async function call(path, options = {}) {
  const key = sessionStorage.getItem("key");
  const headers = { ...(options.headers || {}), ...(key ? { Authorization: `Bearer ${key}` } : {}) };
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServiceError("The service cannot be reached.", null, 0);
  }
  if (response.ok) return response;
  const body = await response.json().catch(() => ({}));
  const wait = response.headers.get("Retry-After");
  const message = body.error ? body.error.message : `The service responded with status ${response.status}.`;
  if (response.status === 401) $("key-field").hidden = false;
  throw new ServiceError(wait ? `${message} (Try again in ${wait} s.)` : message, body.error && body.error.param, response.status);
}

// Errors of the service name fields of its API.
function withLabels(message) {
  return message.replace(/\b[a-z]+(_[a-z]+)+\b/g, (name) => LABELS[name] || name);
}

function showError(message, param = null) {
  $("error").textContent = withLabels(message || "");
  $("error").hidden = !message;
  for (const field of document.querySelectorAll("[aria-invalid]")) field.removeAttribute("aria-invalid");
  const field = param && $(param);
  if (message && field) {
    field.setAttribute("aria-invalid", "true");
    if (field.closest("details")) field.closest("details").open = true;
    field.focus();
  }
}

// ---- settings

async function loadModels() {
  models = (await (await call("v1/models")).json()).data;
  $("model").replaceChildren(...models.map((m) => new Option(m.id, m.id)));
  $("model-field").hidden = models.length < 2;
  chooseModel();
}

function chosenModel() {
  return models.find((m) => m.id === $("model").value) || models[0];
}

function chooseModel() {
  const model = chosenModel();
  const classes = classOptions(model);
  const none = new Option("none", "");
  $("class_label").replaceChildren(...(model.text ? [none, ...classes] : [...classes, none]));
  $("class-field").hidden = model.text && model.num_classes === 0;
  $("size").replaceChildren(...model.sizes.map((size) => new Option(size.replace("x", " x "), size)));
  $("size-field").hidden = model.sizes.length < 2;
  $("prompt-field").hidden = $("advanced").hidden = !model.text;
  for (const [name, maximum] of Object.entries(model.maximum)) if ($(name)) $(name).max = maximum;
  const steps = $("num_inference_steps");
  if (Number(steps.value) === defaultSteps || Number(steps.value) > Number(steps.max)) steps.value = model.steps;
  defaultSteps = model.steps;
  if (wantedArStep === defaultArStep) wantedArStep = model.ar_step;
  defaultArStep = model.ar_step;
  $("guidance_scale").disabled = model.student; // it has learnt guidance
  if (model.student) $("guidance_scale").value = 1;
  settingsChanged();
}

function classOptions(model) {
  return Array.from({ length: model.num_classes }, (_, i) => new Option(model.class_names[i] || `class ${i}`, i));
}

function settings() {
  const values = { model: $("model").value || null, size: $("size").value || null };
  values.class_label = $("class_label").value === "" ? null : Number($("class_label").value);
  if (models.length && chosenModel().text) for (const name of TEXTS) values[name] = $(name).value.trim() || null;
  for (const name of NUMBERS) {
    const text = $(name).value.trim();
    values[name] = text === "" ? null : Number(text);
  }
  return values;
}

function smallestArStep(frames, steps) {
  const model = chosenModel();
  if (model && model.student) return steps; // it has only seen clean frames before a frame
  return model && frames > model.window_frames ? Math.ceil(steps / model.window_frames) : 0;
}

function settingsChanged() {
  const steps = Math.max(1, Number($("num_inference_steps").value) || 1);
  const frames = Math.max(1, Number($("num_frames").value) || 1);
  const smallest = smallestArStep(frames, steps);
  $("ar_step").max = steps;
  $("ar_step").min = smallest;
  const step = Math.min(Math.max(wantedArStep, smallest), steps);
  $("ar_step").value = step;
  $("ar_step_value").textContent = step;
  const overlap = step === 0 ? "all frames together" : step >= steps ? "one frame after another" : "frames overlap";
  $("ar_step_help").textContent = `ar_step ${smallest} to ${steps}; ${step}: ${overlap}, ${steps + (frames - 1) * step} iterations.`;
  if (!current || !ACTIVE.includes(current.status)) {
    drawSchedule({ num_frames: frames, num_inference_steps: steps, ar_step: step, given_frames: 0 }, 0);
  }
}

// ---- requesting, watching

async function requestVideo(event) {
  event.preventDefault();
  showError("");
  const values = settings();
  const file = $("input_reference").files[0];
  if ($("key").value) sessionStorage.setItem("key", $("key").value);
  $("go").disabled = true;
  try {
    const options = { method: "POST" };
    if (file) {
      options.body = new FormData();
      for (const [name, value] of Object.entries(values)) if (value !== null) options.body.append(name, value);
      options.body.append("input_reference", file);
      if (models.length) showUpload(file);
    } else {
      options.headers = { "Content-Type": "application/json" };
      options.body = JSON.stringify(values);
    }
    if (models.length === 0) await loadModels();
    show(await (await call("v1/videos", options)).json(), true);
  } catch (error) {
    if (current) update(current);
    else announce("Choose settings, then generate.");
    showError(error.message, error.param);
  } finally {
    $("go").disabled = false;
    if (!$("progress").hasAttribute("value")) $("progress").value = current ? current.progress : 0;
  }
}

function showUpload(file) {
  announce(`Sending ${file.name}, which the service decodes.`);
  $("progress").removeAttribute("value"); // busy, for an unknown time
}

function show(video, fresh) {
  shown += 1;
  broken = false;
  if (playing) playing.abort();
  playing = new AbortController();
  update(video);
  if (fresh) remember(video);
  if (ACTIVE.includes(video.status) || video.status === "completed") play(video, playing.signal);
  if (ACTIVE.includes(video.status)) watch(video.id, shown);
  $("player").scrollIntoView({ block: "nearest", behavior: "smooth" });
}

async function watch(id, number) {
  while (number === shown) {
    await new Promise((resolve) => setTimeout(resolve, 300));
    if (number !== shown) return;
    try {
      const video = await (await call(`v1/videos/${id}`)).json();
      if (number !== shown) return;
      update(video);
      if (!ACTIVE.includes(video.status)) {
        if (broken && video.status === "completed") play(video, playing.signal);
        refreshHistory();
        return;
      }
    } catch (error) {
      announce(error.message);
      if (error.status === 404 || error.status === 401) return;
    }
  }
}

const WORDS = { queued: "Queued", in_progress: "Generating", completed: "Completed", failed: "Failed", cancelled: "Cancelled", expired: "Expired" };

function announce(text) {
  // Screen readers read every change aloud.
  if ($("status").textContent !== text) $("status").textContent = text;
}

function update(video) {
  current = video;
  const active = ACTIVE.includes(video.status);
  const first = video.first_frame_seconds === null ? "" : `, first frame after ${video.first_frame_seconds.toFixed(1)} s`;
  const complete = video.completed_seconds === null ? "" : `, complete after ${video.completed_seconds.toFixed(1)} s`;
  const reason = video.error ? `: ${video.error.message}` : "";
  announce(`${WORDS[video.status]}${reason}. Seed ${video.seed}.`);
  $("status").dataset.state = video.status;
  $("counts").textContent = `${video.frames_done} of ${video.num_frames} frames${first}${complete}`;
  $("progress").value = video.progress;
  $("cancel").disabled = !active;
  offerChange(video);
  $("links").replaceChildren(...(video.status === "completed" ? [downloadLink(video)] : []));
  drawSchedule(video, video.iterations_done);
}

async function play(video, signal) {
  const element = $("video");
  element.loop = video.status === "completed"; // a stream is looped when it has ended
  const path = `v1/videos/${video.id}/${video.status === "completed" ? "content" : "stream"}`;
  const Source = window.ManagedMediaSource || window.MediaSource;
  try {
    if (video.status === "completed") {
      setSource(URL.createObjectURL(await (await call(path, { signal })).blob()));
      element.play().catch(() => {});
      return;
    }
    const response = await call(path, { signal });
    const type = response.headers.get("Content-Type");
    if (Source && Source.isTypeSupported(type)) await playStream(new Source(), type, response, path, signal);
    else await playWhole(response, signal);
  } catch (error) {
    if (error.name === "AbortError" || signal.aborted) return;
    broken = true; // the finished video is shown later
  }
}

function setSource(url) {
  const element = $("video");
  if (element.src.startsWith("blob:")) URL.revokeObjectURL(element.src);
  element.src = url;
}

async function playStream(source, type, response, path, signal) {
  const element = $("video");
  element.disableRemotePlayback = true;
  const opened = new Promise((resolve) => source.addEventListener("sourceopen", resolve, { once: true }));
  setSource(URL.createObjectURL(source));
  await opened;
  const buffer = source.addSourceBuffer(type);
  let started = false;
  for await (const value of bytes(response, path, signal)) {
    if (signal.aborted) return;
    const appended = new Promise((resolve, reject) => {
      buffer.addEventListener("updateend", resolve, { once: true });
      buffer.addEventListener("error", reject, { once: true });
    });
    buffer.appendBuffer(value);
    await appended;
    if (!started && element.buffered.length) {
      started = true;
      element.play().catch(() => {});
    }
  }
  if (source.readyState === "open") source.endOfStream();
  element.loop = true;
  if (element.ended) element.play().catch(() => {});
}

// The bytes of a stream. After a broken connection it continues at the next byte, through whichever replica answers.
async function* bytes(response, path, signal) {
  let received = 0;
  for (let tries = 0; ;) {
    const tag = response.headers.get("ETag"); // none for a stored file, whose bytes are others
    try {
      const reader = response.body.getReader();
      for (;;) {
        const { done, value } = await reader.read();
        if (done) return;
        received += value.length;
        tries = 0;
        yield value;
      }
    } catch (error) {
      if (signal.aborted || !tag) throw error;
    }
    for (;;) {
      try {
        response = await call(`${path}?offset=${received}`, { signal, headers: { "If-Match": tag } });
        break;
      } catch (error) {
        tries += 1;
        if (![0, 502, 503, 504].includes(error.status) || tries > MAX_TRIES) throw error;
        await new Promise((resolve) => setTimeout(resolve, 1000));
      }
    }
  }
}

// Without Media Source Extensions: play the complete video.
async function playWhole(response, signal) {
  const blob = await response.blob();
  if (signal.aborted) return;
  setSource(URL.createObjectURL(blob));
  $("video").loop = true;
  $("video").play().catch(() => {});
}

// ---- changing the shown video while it is generated

function offerChange(video) {
  const model = models.find((m) => m.id === video.model);
  $("change").hidden = !model || !ACTIVE.includes(video.status) || !(model.text || model.num_classes);
  if ($("change").hidden || $("change").dataset.video === video.id) return;
  $("change").dataset.video = video.id;
  $("change-prompt-field").hidden = !model.text;
  $("change-class-field").hidden = model.num_classes === 0;
  $("change-prompt").value = model.text ? video.prompt || "" : "";
  $("change-class").replaceChildren(...(video.class_label === null ? [new Option("none", "")] : []), ...classOptions(model));
  $("change-class").value = video.class_label === null ? "" : video.class_label;
  $("change-status").textContent = "";
}

async function requestChange(event) {
  event.preventDefault();
  const id = current.id;
  const values = {};
  if (!$("change-prompt-field").hidden) values.prompt = $("change-prompt").value.trim();
  if ($("change-class").value !== "") values.class_label = Number($("change-class").value);
  $("change-go").disabled = true;
  let result;
  try {
    const options = { method: "PATCH", headers: { "Content-Type": "application/json" }, body: JSON.stringify(values) };
    const change = await (await call(`v1/videos/${id}`, options)).json();
    result = change.status === "applied" ? `Changed after ${change.from_frame} frames.` : CHANGE_WORDS[change.status];
  } catch (error) {
    result = withLabels(error.message);
  }
  $("change-go").disabled = false;
  if ($("change").dataset.video === id) $("change-status").textContent = result;
}

async function cancel(id) {
  if (current && current.id === id) $("cancel").disabled = true;
  try {
    const video = await (await call(`v1/videos/${id}/cancel`, { method: "POST" })).json();
    if (current && current.id === video.id) update(video);
  } catch (error) {
    showError(error.message);
  }
  refreshHistory();
}

// ---- the schedule: after iteration n, frame f has done clamp(n - f ar_step, 0, S) of its S steps

function drawSchedule(video, done) {
  const canvas = $("schedule");
  const frames = video.num_frames;
  const steps = video.num_inference_steps;
  const given = video.given_frames;
  const iterations = steps + Math.max(0, frames - given - 1) * video.ar_step;
  const width = Math.min(iterations, 900);
  const height = Math.min(frames, 300);
  canvas.width = width;
  canvas.height = height;
  const context = canvas.getContext("2d");
  const image = context.createImageData(width, height);
  const [noise, clean, waiting, moving, ahead] = ["noise", "clean", "waiting", "moving", "ahead"].map(color);
  const shades = Array.from({ length: steps + 1 }, (_, done) => noise.map((value, i) => value + (done / steps) * (clean[i] - value)));
  for (let y = 0; y < height; y += 1) {
    const frame = Math.floor((y * frames) / height);
    for (let x = 0; x < width; x += 1) {
      const n = Math.floor(((x + 1) * iterations) / width);
      const stepsDone = frame < given ? steps : Math.min(Math.max(n - (frame - given) * video.ar_step, 0), steps);
      const later = stepsDone === 0 ? waiting : stepsDone < steps ? moving : ahead;
      image.data.set(n > done ? later : shades[stepsDone], 4 * (y * width + x));
    }
  }
  context.putImageData(image, 0, 0);
  canvas.dataset.done = done;
  const text = `${frames} frames by ${iterations} iterations, ar_step ${video.ar_step}`;
  canvas.setAttribute("aria-label", `Schedule: ${text}; ${done} iterations done`);
  $("schedule-text").textContent = `${text}: each row is a frame, each column an iteration. Grey iterations are not done yet; ${done} are. From noise to clean, the colour gets stronger.`;
}

// Red, green, blue and opacity of a colour of the schedule, which depends on the colour scheme.
function color(name) {
  const probe = document.createElement("span");
  probe.style.color = `var(--schedule-${name})`;
  document.body.append(probe);
  const values = getComputedStyle(probe).color.match(/[0-9.]+/g).slice(0, 3).map(Number);
  probe.remove();
  return [...values, 255];
}

// ---- history

function remembered() {
  try {
    return JSON.parse(localStorage.getItem("videos")) || [];
  } catch {
    return [];
  }
}

function remember(video) {
  const ids = [video.id, ...remembered().filter((id) => id !== video.id)].slice(0, 20);
  localStorage.setItem("videos", JSON.stringify(ids));
  refreshHistory();
}

let refreshes = 0;

async function refreshHistory() {
  const number = ++refreshes;
  const videos = [];
  for (const id of remembered()) {
    try {
      videos.push(await (await call(`v1/videos/${id}`)).json());
    } catch (error) {
      if (error.status === 404) localStorage.setItem("videos", JSON.stringify(remembered().filter((other) => other !== id)));
      else break;
    }
  }
  if (number !== refreshes) return; // a later refresh has newer states
  // A button that is replaced would lose the focus of the keyboard.
  const focused = document.activeElement && document.activeElement.dataset.key;
  $("history").replaceChildren(...videos.map(historyItem));
  $("no-history").hidden = videos.length > 0;
  if (focused) document.querySelector(`[data-key="${focused}"]`)?.focus();
  if (videos.some((video) => ACTIVE.includes(video.status))) {
    setTimeout(() => { if (number === refreshes) refreshHistory(); }, 1000);
  }
}

function historyItem(video) {
  const item = document.createElement("li");
  const text = document.createElement("span");
  const model = models.find((m) => m.id === video.model);
  const name = video.class_label === null ? "no class" : (model && model.class_names[video.class_label]) || `class ${video.class_label}`;
  const values = { ...video, class_label: name };
  const readsText = model && model.text; // the prompt of a model without text is its class
  if (readsText && video.class_label === null) values.class_label = null;
  for (const field of TEXTS) values[field] = readsText && video[field] ? quoted(video[field]) : null;
  if (!model || model.sizes.length < 2) values.size = null;
  const named = Object.keys(LABELS).filter((field) => field in values && values[field] !== null);
  text.textContent = named.map((field) => `${LABELS[field]} ${values[field]}`).join(", ");
  const state = document.createElement("span");
  state.className = "state";
  state.textContent = WORDS[video.status];
  item.append(text, state);
  const active = ACTIVE.includes(video.status);
  if (video.status === "completed" || active) item.append(historyButton(video, "Show", text.textContent, () => show(video, false)));
  if (active) item.append(historyButton(video, "Cancel", text.textContent, () => cancel(video.id)));
  if (video.status === "completed") item.append(downloadLink(video));
  return item;
}

function quoted(text) {
  const characters = [...text];
  return `“${characters.length > MAX_SHOWN ? `${characters.slice(0, MAX_SHOWN).join("")}…` : text}”`;
}

function historyButton(video, label, about, action) {
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = label;
  button.dataset.key = `${label} ${video.id}`;
  button.setAttribute("aria-label", `${label}: ${about}`);
  button.addEventListener("click", action);
  return button;
}

function downloadLink(video) {
  const link = document.createElement("a");
  link.href = `v1/videos/${video.id}/content`;
  link.download = `${video.id}.${(video.media_type || "").startsWith("video/webm") ? "webm" : "mp4"}`;
  link.textContent = `Download (${Math.ceil((video.bytes || 0) / 1024)} KiB)`;
  link.addEventListener("click", async (event) => {
    if (!sessionStorage.getItem("key")) return; // without a key the browser downloads by itself
    event.preventDefault();
    try {
      const url = URL.createObjectURL(await (await call(link.getAttribute("href"))).blob());
      Object.assign(document.createElement("a"), { href: url, download: link.download }).click();
    } catch (error) {
      announce(error.message);
    }
  });
  return link;
}

async function start() {
  $("request").addEventListener("submit", requestVideo);
  $("change").addEventListener("submit", requestChange);
  $("cancel").addEventListener("click", () => current && cancel(current.id));
  $("model").addEventListener("change", chooseModel);
  $("ar_step").addEventListener("input", () => { wantedArStep = Number($("ar_step").value); });
  for (const id of ["num_frames", "num_inference_steps", "ar_step"]) $(id).addEventListener("input", settingsChanged);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    if (current) drawSchedule(current, current.iterations_done);
    else settingsChanged();
  });
  $("key").addEventListener("change", () => {
    sessionStorage.setItem("key", $("key").value);
    showError("");
    connect();
  });
  await connect();
}

async function connect() {
  try {
    await loadModels();
    await refreshHistory();
  } catch (error) {
    showError(error.message);
  }
}

start();
