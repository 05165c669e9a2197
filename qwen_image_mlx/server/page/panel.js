// One task's panel: its form, its wells, the job that runs, and what came of it.

import { ApiError, follow, submit } from "./api.js";
import { all, button, duration, el, one, say } from "./dom.js";
import { newId, note, tab, unnote } from "./history.js";
import { markSmall } from "./pictures.js";
import { makeWell } from "./well.js";

const STAGES = {
  queued: "Waiting",
  download: "Downloading the model",
  load: "Loading the model",
  quantize: "Packing the model",
  encode: "Reading the prompt",
  caption: "Describing the picture",
  denoise: "Painting",
  decode: "Developing",
};
const AGAIN = ["gone", "stopped", "stopping", "timeout"]; // ends that nobody here wished for
const COUNTED = ["denoise", "caption", "download"];

/**
 * @param {HTMLElement} section the panel; `data-task` is its task.
 * @param {string} verb what its button says.
 * @param {(result: object, settings: object, before: ?string, kept: object) => Promise<Node>} show makes what is shown of
 *   a result; `kept` is its id in the history, and the work done on it.
 * @param {(entry: object) => Promise<void>} painted is told of every result.
 */
export class Panel {
  constructor(section, verb, show, painted) {
    this.section = section;
    this.task = section.dataset.task;
    this.form = one("form", section);
    this.stage = one(".stage", section);
    this.show = show;
    this.painted = painted;
    this.running = null;
    this.offered = false;
    this.shown = null; // id of the entry of the history that is on the stage
    this.restored = false;
    const common = one("[data-common]", this.form);
    common.append(one("#common").content.cloneNode(true));
    if (this.task === "decompose") one("[data-count]", common).remove();
    this.notice = el("p", { class: "notice", role: "alert", hidden: true });
    this.button = el("button", { class: "primary", "data-go": "" }, verb);
    this.stop = button("Cancel", () => this.cancel(), { "data-cancel": "", hidden: true });
    this.model = el("p", { class: "faint" });
    one(".go", this.form).append(this.notice, el("div", { class: "row" }, this.button, this.stop,
      el("span", { class: "faint keys" }, /Mac|iP/.test(navigator.platform) ? "⌘ ↵" : "Ctrl ↵")), this.model);
    this.wells = all("[data-well]", this.form).map((node) => makeWell(node, () => this.follow(), (message) => this.say(message)));
    this.form.noValidate = true; // `start` validates, so that keys and button say the same
    this.form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.start();
    });
    this.form.addEventListener("input", () => this.follow());
    section.addEventListener("dragover", (event) => {
      if (!event.dataTransfer.types.includes("Files")) return;
      event.preventDefault();
      section.classList.add("dropping");
    });
    section.addEventListener("dragleave", (event) => {
      if (!section.contains(event.relatedTarget)) section.classList.remove("dropping");
    });
    section.addEventListener("drop", (event) => {
      event.preventDefault();
      section.classList.remove("dropping");
      this.take([...event.dataTransfer.files]);
    });
    this.follow();
  }

  /** Puts files into the panel's well. */
  take(files) {
    const [well] = this.wells;
    const around = well.node.closest("details");
    if (around && files.length) around.open = true;
    return well.add(files);
  }

  /** Fits the form to what the server offers. */
  configure({ tasks, defaults = {}, fields = {}, limits = {} }) {
    const offer = tasks[this.task];
    this.offered = Boolean(offer);
    this.button.disabled = !offer;
    this.model.textContent = offer ? offer.model : "";
    if (!offer) {
      this.say("This server has no model for that. Name one in its config.toml.");
      return;
    }
    this.notice.hidden = true;
    const form = this.form.elements;
    for (const [name, field] of Object.entries(fields[this.task] ?? {})) this.offer(name, field);
    form.steps.placeholder = offer.steps ?? defaults.steps ?? "";
    form.cfg_scale.placeholder = offer.cfg_scale ?? defaults.cfg_scale ?? "";
    form.negative_prompt.placeholder = defaults.negative_prompt ?? "";
    if (defaults.seed != null) form.seed.placeholder = defaults.seed;
    if (limits.max_steps) form.steps.max = limits.max_steps;
    if (form.num_images && limits.num_images) form.num_images.max = limits.num_images;
    if (form.num_layers) form.num_layers.value = offer.num_layers ?? defaults.num_layers ?? form.num_layers.value;
    const described = one("[data-captions]", this.form);
    if (described) {
      described.hidden = form.prompt.required = offer.captions === false;
      if (!described.hidden) form.prompt.placeholder = "Nothing: the model describes it";
    }
    if (form.resolution) {
      const usual = offer.resolution ?? defaults.resolution;
      form.resolution.replaceChildren(...(offer.resolutions ?? []).map((side) =>
        el("option", { value: side, selected: side === usual }, `${side} × ${side}`)));
      one("[data-resolutions]", this.form).hidden = !(offer.resolutions?.length > 1);
    }
    const chips = one("[data-aspects] .chips", this.form);
    if (chips) {
      const usual = defaults.aspect ?? "1:1";
      chips.replaceChildren(...Object.entries(offer.sizes ?? {}).map(([aspect, [width, height]]) =>
        el("label", { class: "chip", title: `${width} × ${height} pixels` },
          el("input", { type: "radio", name: "aspect", value: aspect, checked: aspect === usual }),
          el("span", {}, aspect, el("small", {}, `${width} × ${height}`)))));
      if (chips.children.length < 2) chips.parentNode.remove();
    }
    this.follow();
  }

  /** Gives an input the ends that the server says, or makes one for what the page has no input of its own for. */
  offer(name, { type, min, max, choices = [], help }) {
    let input = this.form.elements[name];
    if (!input) {
      const step = type === "number" ? "any" : "1";
      const words = name.replaceAll("_", " ");
      input = type === "choice"
        ? el("select", { name }, el("option", { value: "" }, "As usual"), ...choices.map((value) => el("option", { value }, value)))
        : el("input", { name, type: { switch: "checkbox", text: "text" }[type] ?? "number", ...(type === "number" || type === "integer" ? { step } : {}) });
      one("[data-common]", this.form).append(el("label", { class: type === "switch" ? "check" : "field", title: help },
        ...(type === "switch" ? [input, " ", el("span", {}, words)] : [el("span", {}, words), input])));
    }
    if (input.type === "number" && Number.isSafeInteger(min)) input.min = min;
    if (input.type === "number" && Number.isSafeInteger(max)) input.max = max;
  }

  /** Notes what the form says, for when the page is opened again. */
  keep() {
    clearTimeout(this.keeping);
    if (!this.restored) return;
    this.keeping = setTimeout(() => note({
      id: `form ${tab} ${this.task}`, kind: "form", task: this.task, settings: this.settings(), wells: this.chosen(), shown: this.shown,
    }), 200);
  }

  /** The pictures of the wells, by their names. */
  chosen() {
    return Object.fromEntries(this.wells.filter(({ pictures }) => pictures.length).map(({ name, pictures, mask }) => [name, { pictures, mask }]));
  }

  /** Shows what belongs to what is filled in, and the values of sliders. */
  follow() {
    this.keep();
    const filled = { image: false, mask: false };
    for (const well of this.wells ?? []) {
      filled.image ||= well.pictures.length > 0;
      filled.mask ||= Boolean(well.mask);
    }
    for (const node of all("[data-with]", this.form)) node.hidden = !filled[node.dataset.with];
    for (const node of all("[data-without]", this.form)) node.hidden = filled[node.dataset.without];
    for (const node of all(".slider input[type=range]", this.form)) {
      const output = one("output", node.parentNode);
      if (output) output.textContent = Number(node.max) === 1 ? `${Math.round(node.value * 100)}%` : node.value;
    }
  }

  /** What the form says, as the API's fields; nothing where it is empty or not shown. */
  settings() {
    const fields = {};
    for (const input of this.form.elements) {
      if (!input.name || input.closest("[hidden]:not(.panel)") || (input.type === "radio" && !input.checked)) continue;
      if (input.type === "checkbox") {
        if (input.checked) fields[input.name] = true;
      } else if (input.value.trim()) {
        const numeric = ["number", "range"].includes(input.type) || input.dataset.type === "number";
        fields[input.name] = numeric ? Number(input.value) : input.value;
      }
    }
    return fields;
  }

  /** Puts settings and pictures back into the form. */
  fill(settings, wells = {}) {
    for (const input of this.form.elements) {
      if (!input.name) continue;
      const value = settings[input.name];
      if (input.type === "radio") input.checked = value === undefined ? input.defaultChecked : input.value === value;
      else if (input.type === "checkbox") input.checked = Boolean(value);
      else if (value !== undefined) input.value = value;
      else if (input.type !== "range" && input.tagName !== "SELECT") input.value = "";
    }
    for (const well of this.wells) {
      const { pictures = [], mask = null } = wells[well.name] ?? {};
      well.set(pictures, mask);
      const around = well.node.closest("details");
      if (around) around.open = pictures.length > 0;
    }
    this.follow();
  }

  /** Says a sentence above the button; with `again` seconds it counts down to another try; 0 offers it at once. */
  say(message, again = null) {
    clearInterval(this.countdown);
    this.notice.hidden = false;
    this.notice.replaceChildren(message);
    if (again == null) return;
    const retry = button("Try again", () => this.start(), { class: "link" });
    const left = el("span", { class: "faint" });
    this.notice.append(" ", left, " ", retry);
    const tick = () => {
      left.textContent = again > 0 ? `(${again} s)` : "";
      retry.disabled = again > 0;
      if (again <= 0) clearInterval(this.countdown);
      again -= 1;
    };
    tick();
    this.countdown = setInterval(tick, 1000);
  }

  /** Cancels what runs; true if something did. */
  cancel() {
    if (!this.running) return false;
    this.running.abort();
    this.stop.disabled = true;
    return true;
  }

  /** Runs the job that the form describes. */
  async start() {
    if (this.running || !this.offered) return;
    clearInterval(this.countdown);
    this.notice.hidden = true;
    const missing = this.wells.find((well) => !well.pictures.length && !well.node.closest("details"));
    if (missing) {
      this.say("Choose a picture first.");
      return;
    }
    for (const wrong of all("details :invalid", this.form)) wrong.closest("details").open = true;
    if (!this.form.reportValidity()) return;
    const settings = this.settings();
    const fields = { ...settings };
    const wells = this.chosen();
    for (const { name, most } of this.wells) {
      if (!wells[name]) continue;
      const { pictures, mask } = wells[name];
      fields[name] = most > 1 ? pictures.map(({ url }) => url) : pictures[0].url;
      if (mask) fields.mask = mask.url;
    }
    await this.attend(settings, wells, async () => {
      const job = await submit(this.task, fields);
      const record = { id: `job ${job}`, kind: "job", job, task: this.task, entry: newId(), settings, wells };
      await note(record);
      return record;
    });
  }

  /** Takes up a job that was begun before the page was opened. */
  async resume(record) {
    this.fill(record.settings, record.wells);
    await this.attend(record.settings, record.wells, async () => record);
  }

  /** Shows how far a job is, to its end, and what it came to. */
  async attend(settings, wells, begin) {
    let record = null;
    this.running = new AbortController();
    const focused = document.activeElement === this.button;
    this.stop.disabled = true; // a moment only, so that a double click does not cancel
    setTimeout(() => { this.stop.disabled = !this.running || this.running.signal.aborted; }, 500);
    this.button.hidden = !(this.stop.hidden = false);
    const before = [...this.stage.childNodes];
    const progress = new Progress();
    this.stage.replaceChildren(progress.node);
    progress.node.scrollIntoView({ block: "nearest", behavior: "smooth" });
    try {
      record = await begin();
      const result = await follow(record.job, (event, data) => progress.tell(event, data), this.running.signal);
      await this.painted({ task: this.task, settings, wells, result, id: record.entry });
      await this.present(result, settings, wells, { id: record.entry });
      say("Done.");
    } catch (error) {
      this.stage.replaceChildren(...before);
      if (!(error instanceof ApiError)) {
        this.say("Something went wrong on this page.");
        throw error;
      }
      if (error.code === "cancelled") say("Cancelled.");
      else this.say(error.message, AGAIN.includes(error.code) ? 0 : error.retryAfter || null);
    } finally {
      if (record) await unnote(record.id);
      this.running = null;
      this.button.hidden = !(this.stop.hidden = true);
      if (focused && document.activeElement === document.body) this.button.focus({ preventScroll: true });
    }
  }

  /** Shows a result. */
  async present(result, settings, wells, kept) {
    const [well] = Object.values(wells);
    this.stage.replaceChildren(await this.show(result, settings, well?.pictures[0].url, kept));
    this.shown = kept.id;
    this.keep();
  }
}

/** How far a job is: a preview, a bar, and words. */
class Progress {
  constructor() {
    this.preview = el("img", { alt: "", hidden: true });
    this.bar = el("progress", { max: 1, "aria-label": "Progress" });
    this.now = el("span", {}, "Sending");
    this.left = el("span", { class: "faint" });
    this.quarter = 0;
    this.node = el("div", { class: "progress" }, el("div", { class: "frame waiting" }, this.preview), this.bar,
      el("p", { class: "row" }, this.now, el("span", { class: "grow" }), this.left));
  }

  tell(event, data) {
    ({
      queued: ({ position }) => this.words(position ? `Waiting: ${position} before it` : STAGES.queued),
      stage: ({ stage, detail }) => {
        this.stage = stage;
        this.bar.removeAttribute("value");
        this.left.textContent = COUNTED.includes(stage) ? "" : detail;
        this.words(STAGES[stage] ?? stage);
      },
      step: ({ step, total, seconds_left: left }) => {
        this.bar.value = total ? step / total : 0;
        if (this.stage === "denoise") this.now.textContent = `${STAGES.denoise}, step ${step} of ${total}`;
        this.left.textContent = left == null ? "" : `${duration(left)} left`;
        const quarter = Math.floor((4 * step) / (total || 1));
        if (quarter > this.quarter) say(`${25 * quarter} percent`);
        this.quarter = quarter;
      },
      preview: ({ image }) => {
        this.preview.src = image;
        this.preview.hidden = false;
        this.preview.onload = () => markSmall(this.preview.parentNode, this.preview.naturalWidth, this.preview.naturalHeight);
      },
      lost: () => {
        this.left.textContent = "";
        this.words("Connection lost, trying again. The job goes on.");
      },
    })[event]?.(data);
  }

  words(text) {
    this.now.textContent = text;
    say(text);
  }
}
