// The page in the browser: asks what is new, shows it, and sends what the person does. No framework, no eval.
// State lives on the server; this file holds only what is on the screen.

const PACE_MS = 95; // between two questions while an answer grows: about ten updates a second
const FIRST = 40; // turns drawn at once when a conversation opens; the earlier ones follow
const at = (path) => new URL(path, document.baseURI);
const find = (selector, within = document) => within.querySelector(selector);
const language = navigator.language || "en";

let say = {}; // the texts, from the server
let have = {}; // what is seen already, as the server marks it
let turns = []; // [id, key] of the shown path
let texts = new Map(); // id -> the text as stored
let chat = ""; // the open conversation
let query = "";
let model;
let wake = () => {}; // ends the waiting question
let live = null; // {node, text, thought}: blocks that are shown for good

// ---------------------------------------------------------------- talking to the server

async function ask(path, body, signal) {
  const response = await fetch(at("chat/" + path), {
    method: "POST",
    headers: { "content-type": "application/json", ...(path === "act" || path === "replay" ? await lent() : {}) },
    body: JSON.stringify({ language, ...body }),
    signal,
  });
  const answer = await response.json();
  if (!response.ok) throw new Refused(answer.error || response.statusText);
  return answer;
}

// In a frame of huggingface.co, that page may know who is signed in, and lends a ZeroGPU Space a token for a request.
// Gradio's script asks whether it does, and does the same for its own requests.
async function lent() {
  if (say.mode !== "space" || !window.supports_zerogpu_headers) return {};
  const { port1, port2 } = new MessageChannel();
  const answer = new Promise((done) => {
    port1.onmessage = (message) => done(message.data ?? {});
    setTimeout(done, 1000, {});
  });
  window.parent.postMessage("zerogpu-headers", "https://huggingface.co", [port2]);
  return answer.finally(() => port1.close());
}

class Refused extends Error {}

async function act(what, more = {}) {
  try {
    await ask("act", { do: what, chat, ...more });
    return true;
  } catch (error) {
    toast(error instanceof Refused ? error.message : say.lost, "error");
    return false;
  }
}

async function follow() {
  let failures = 0;
  for (;;) {
    const asked = chat;
    const leave = new AbortController();
    wake = () => leave.abort();
    try {
      if (document.hidden) await visible();
      const thought = find("#transcript article[data-state=writing] details.thought");
      const news = await ask(
        "tail",
        {
          chat, query, have,
          node: live?.node ?? 0,
          text: live?.text ?? 0,
          thought: thought?.open ? (live?.thought ?? 0) : null,
        },
        leave.signal,
      );
      if (failures) document.body.classList.remove("lost");
      failures = 0;
      if (asked === chat) await show(news);
    } catch (error) {
      if (error.name !== "AbortError") {
        if (error instanceof Refused) console.warn(error.message);
        if (++failures > 1) document.body.classList.add("lost");
        await sleep(Math.min(5000, 300 * failures));
      }
    }
    await sleep(PACE_MS);
  }
}

const sleep = (ms) => new Promise((done) => setTimeout(done, ms));
const visible = () =>
  new Promise((done) => {
    document.addEventListener("visibilitychange", done, { once: true });
    wake = done;
  });

// ---------------------------------------------------------------- showing what is new

async function show(news) {
  if (news.have.epoch !== have.epoch) texts = new Map();
  have = news.have;
  if (news.turns) await showTurns(news.turns);
  if (news.chat) showTitle(news.chat);
  if (news.files !== undefined) swap(find("#files .chips"), news.files);
  if ("list" in news) showList(news.list);
  if (news.status !== undefined) swap(find("#status"), news.status);
  if (news.have.model !== model) {
    model = news.have.model;
    if (!turns.length) press("#opened"); // the settings show what the new model recommends
  }
  if (news.live) showLive(news.live);
  place();
  noted();
  document.body.classList.toggle("busy", !!news.live);
  announce(news.live);
  if (follows) toBottom();
}

async function showTurns(order) {
  const box = find("#transcript");
  const before = new Map([...box.querySelectorAll("article")].map((one) => [one.dataset.key, one]));
  const missing = order.filter(([, key]) => !before.has(key)).map(([id]) => id);
  turns = order;
  document.body.classList.toggle("empty", !order.length);
  if (missing.length > FIRST) {
    await draw(order, before, missing.slice(-FIRST));
    toBottom();
    for (let end = missing.length - FIRST; end > 0 && turns === order; end -= 100) {
      await draw(order, before, missing.slice(Math.max(0, end - 100), end));
    }
  } else {
    await draw(order, before, missing);
  }
}

async function draw(order, before, ids) {
  const asked = chat;
  const drawn = ids.length ? await ask("turns", { chat, ids }) : {};
  if (asked !== chat || turns !== order) return;
  for (const [id, one] of Object.entries(drawn)) {
    const made = document.createElement("template");
    made.innerHTML = one.html;
    const article = made.content.firstElementChild;
    article.dataset.key = one.key;
    texts.set(+id, one.text);
    const old = find(`#transcript article[data-id="${id}"]`);
    const open = old && find("details.thought", old)?.open;
    if (open) find("details.thought", article)?.setAttribute("open", "");
    before.set(one.key, article);
    if (article.dataset.state === "writing") {
      live = { node: +id, text: 0, thought: 0 };
      follows = true; // somebody asked for it: show it
    }
    formulas(article);
  }
  const shown = order.map(([, key]) => before.get(key)).filter(Boolean);
  const box = find("#transcript");
  const held = box.scrollHeight - window.scrollY;
  const top = window.scrollY;
  const keep = new Set(shown);
  for (const old of [...box.children]) if (!keep.has(old)) old.remove();
  let place = box.firstElementChild;
  for (const article of shown) {
    if (article === place) place = place.nextElementSibling;
    else box.insertBefore(article, place);
  }
  if (ids.length && order.findIndex(([id]) => id === ids[0]) === 0 && order.length > FIRST && top > 0) {
    window.scrollTo({ top: box.scrollHeight - held, behavior: "instant" }); // earlier turns came in above
  }
}

function showLive(news) {
  const article = find(`#transcript article[data-id="${news.node}"]`);
  if (!article) return;
  if (live?.node !== news.node) live = { node: news.node, text: 0, thought: 0 };
  article.dataset.phase = news.phase;
  article.dataset.label = news.label;
  blocks(find(".text", article), news.text);
  live.text = news.text.from + news.text.blocks.length - 1;
  const thought = find("details.thought", article);
  if (thought && news.thinks) {
    thought.hidden = false;
    find("summary", thought).textContent = news.thought_label;
    if (news.thought) {
      blocks(find(".thought-text", thought), news.thought);
      live.thought = news.thought.from + news.thought.blocks.length - 1;
    }
  }
}

function blocks(box, { from, blocks }) {
  while (box.children.length > from) box.lastElementChild.remove();
  for (const block of blocks) {
    if (!block) continue;
    const made = document.createElement("div");
    made.className = "block";
    made.innerHTML = block;
    formulas(made);
    box.append(made);
  }
}

function showTitle({ title }) {
  document.title = title ? `${title} · ${say.title}` : say.title;
  find("#title").textContent = title || "";
}

function showList(list) {
  swap(find("#list .rows"), list);
  mark();
}

function mark() {
  for (const row of document.querySelectorAll("#list .chat")) {
    row.classList.toggle("current", row.dataset.chat === chat);
    find(".open", row)?.toggleAttribute("aria-current", row.dataset.chat === chat);
  }
}

function swap(box, made) {
  if (box.made !== made) box.innerHTML = box.made = made;
}

let announced = false;
function announce(growing) {
  if (!!growing === announced) return;
  announced = !!growing;
  find("#announcer").textContent = announced ? say.generating : say.done;
}

let katex;
function formulas(box) {
  const all = box.querySelectorAll(".math");
  const source = find("meta[name=katex]")?.content;
  if (!all.length || !source) return;
  const render = (katex) => {
    for (const one of all) {
      try {
        katex.render(one.dataset.tex, one, {
          displayMode: one.classList.contains("display"), throwOnError: true, trust: false, maxExpand: 200, maxSize: 20,
        });
      } catch {
        one.classList.add("broken"); // the TeX stays as it was typed
      }
    }
  };
  if (katex?.render) render(katex);
  else import(at(source)).then((module) => render((katex = module.default)), () => {});
}

// ---------------------------------------------------------------- scrolling

let follows = true;
const distance = () => document.documentElement.scrollHeight - window.innerHeight - window.scrollY;
function toBottom() {
  window.scrollTo({ top: document.documentElement.scrollHeight, behavior: "instant" });
}
function scrolled() {
  follows = distance() < 60;
  document.body.classList.toggle("above", distance() > 300);
}

// ---------------------------------------------------------------- conversations

const fresh = (temporary = false) =>
  (temporary ? "temporary-" : "") + crypto.getRandomValues(new Uint8Array(16)).reduce((all, one) => all + one.toString(16).padStart(2, "0"), "");

function open(name) {
  if (name !== chat) {
    chat = name;
    sessionStorage.setItem("chat", chat);
    turns = [];
    texts = new Map();
    live = null;
    have = { list: have.list, model: have.model };
    find("#transcript").replaceChildren();
    swap(find("#files .weight"), "");
    document.body.classList.toggle("temporary", chat.startsWith("temporary-"));
    follows = true;
    place();
    mark();
    press("#opened");
    wake();
  }
  if (matchMedia("(max-width: 768px)").matches) closeSidebars();
  focusBox();
}

// Gradio reads a hidden field: which conversation, and below which message.
function place() {
  fill("#here", JSON.stringify({ chat, after: turns.length ? turns[turns.length - 1][0] : null }));
}

function fill(selector, value) {
  const field = find(`${selector} textarea, ${selector} input`);
  if (!field || field.value === value) return;
  const proto = field instanceof HTMLTextAreaElement ? HTMLTextAreaElement.prototype : HTMLInputElement.prototype;
  Object.getOwnPropertyDescriptor(proto, "value").set.call(field, value);
  field.dispatchEvent(new Event("input", { bubbles: true }));
}

const press = (selector) => (find(`${selector} button`) ?? find(selector))?.click();
const theBox = () => find("#box textarea");
const focusBox = () => matchMedia("(pointer: fine)").matches && theBox()?.focus();

// ---------------------------------------------------------------- what the person does

const deeds = {
  open: (button) => open(button.closest(".chat").dataset.chat),
  new: () => open(fresh()),
  "new-temporary": () => open(fresh(true)),
  stop: () => act("stop"),
  light_dark: () => {
    const dark = document.body.classList.toggle("dark");
    localStorage.setItem("theme", dark ? "dark" : "light");
  },
  settings: () => press("#settings .toggle-button"),
  chats: () => press("#chats .toggle-button"),
  bottom: () => toBottom(),
  help: () => find("#help").showModal(),
  close: (button) => button.closest("dialog").close(),
  suggest: (button) => {
    fill("#box", button.textContent);
    theBox().focus();
  },
  "copy-code": (button) => copy(button, find("pre", button.closest(".code")).textContent),
  attach: () => find("#pick").click(),
  detach: (button) => act("detach", { number: +button.dataset.number }),
  allow_drop: async () => {
    if (await act("allow_drop")) weigh(press("#opened"));
  },
  drop_oldest: async (button, id) => (await act("drop_oldest", { node: id })) && press("#opened"),
  anew: () => tell("anew", { chat }, (made) => {
    open(made.chat);
    fill("#box", made.draft);
  }),
  ledger: () => tell("weigh", { chat, text: theBox().value, whole: true }, (made) => made.ledger && dialog(made.ledger)),
  receipt: (button, id) => tell("receipt", { chat, node: id }, (made) => dialog(made.html)),
  replay: (button) => {
    find("#replayed").textContent = say.replay_running;
    button.disabled = true;
    tell("replay", { chat, node: +button.dataset.node }, (made) => (find("#replayed").innerHTML = made.html), (why) => {
      find("#replayed").textContent = why;
    });
  },
  models: () => models({}),
  model: (button) => models({ do: button.dataset.what, name: button.dataset.name }),
  export: () => dialog(exports()),
  import: () => find("#bring").click(),
  copy: (button, id) => copy(button, texts.get(id) ?? ""),
  regenerate: (button, id) => act("regenerate", { node: id }),
  continue: (button, id) => act("continue", { node: id }),
  earlier: (button, id) => act("earlier", { node: id }),
  later: (button, id) => act("later", { node: id }),
  edit: (button, id) => edit(button.closest("article"), id),
  pin: (button) => act("pin", { chat: button.closest(".chat").dataset.chat }),
  unpin: (button) => act("unpin", { chat: button.closest(".chat").dataset.chat }),
  rename: (button) => rename(button.closest(".chat")),
  delete: async (button) => {
    const row = button.closest(".chat");
    const name = row.dataset.chat;
    const title = find(".open", row).firstChild.textContent;
    if (!(await act("delete", { chat: name }))) return;
    if (name === chat) open(fresh());
    toast(say.deleted.replace("{title}", title), "", say.undo, () => act("restore", { chat: name }));
  },
};

async function tell(path, body, then, otherwise = (why) => toast(why, "error")) {
  try {
    then(await ask(path, body));
  } catch (error) {
    otherwise(error instanceof Refused ? error.message : say.lost);
  }
}

function dialog(html) {
  const box = find("#dialog");
  find("div", box).innerHTML = html;
  if (!box.open) box.showModal();
}

// The list of models, looked at again each second for as long as it is open.
function models(what) {
  tell("models", what, (made) => {
    if (!made.html) return;
    dialog(made.html);
    const box = find("#dialog .models");
    setTimeout(() => box.isConnected && find("#dialog").open && models({}), 1000);
  });
}

function exports() {
  const link = (form, name, label) =>
    `<li><a href="${at(`chat/export?form=${form}&chat=${name}`)}" download>${label}</a></li>`;
  const own = turns.length
    ? link("markdown", chat, say.export_markdown) + link("json", chat, say.export_json) : "";
  return `<h2>${say.export}</h2><ul class="menu">${own}${link("json", "", say.export_all)}${link("jsonl", "", say.export_jsonl)}</ul>` +
    `<button type="button" data-do="import">${say.import}</button>`;
}

// ---------------------------------------------------------------- files

async function attach(files) {
  for (const file of files) {
    const data = await new Promise((done) => {
      const reader = new FileReader();
      reader.onload = () => done(reader.result.slice(reader.result.indexOf(",") + 1));
      reader.readAsDataURL(file);
    });
    await tell("file", { chat, name: file.name, data: file.size ? data : "" }, () => {});
  }
  weigh();
  focusBox();
}

async function bringIn(file) {
  const text = await file.text();
  await tell("import", { text }, (made) => {
    find("#dialog").close();
    open(made.chat);
    toast(say.imported.replace("{count}", made.count));
  });
}

function clicked(event) {
  const button = event.target.closest("[data-do]");
  if (!button || button.disabled) return;
  const article = button.closest("article");
  deeds[button.dataset.do]?.(button, article ? +article.dataset.id : 0);
}

async function copy(button, text) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    const field = document.createElement("textarea");
    field.value = text;
    document.body.append(field);
    field.select();
    document.execCommand("copy"); // a page over plain http on another machine has no clipboard
    field.remove();
  }
  button.classList.add("done");
  find("#announcer").textContent = say.copied;
  setTimeout(() => button.classList.remove("done"), 1200);
}

function edit(article, id) {
  if (find("form", article)) return;
  const text = find(".text", article);
  const form = document.createElement("form");
  const field = document.createElement("textarea");
  field.value = texts.get(id) ?? "";
  field.setAttribute("aria-label", say.edit);
  const own = article.classList.contains("user");
  const bar = document.createElement("div");
  for (const [name, label] of [["cancel", say.cancel], ["save", own ? say.save_send : say.save]]) {
    const button = document.createElement("button");
    button.type = name === "save" ? "submit" : "button";
    button.textContent = label;
    button.className = name;
    if (name === "cancel") button.onclick = end;
    bar.append(button);
  }
  form.append(field, bar);
  form.onsubmit = async (event) => {
    event.preventDefault();
    if (await act("edit", { node: id, text: field.value })) end();
  };
  field.onkeydown = (event) => {
    if (event.key === "Escape") end(event.stopPropagation());
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
  };
  function end() {
    form.remove();
    article.classList.remove("editing");
    focusBox();
  }
  const height = text.offsetHeight;
  article.classList.add("editing");
  text.after(form);
  field.style.height = Math.min(Math.max(height + 24, 72), innerHeight * 0.6) + "px";
  field.focus();
}

function rename(row) {
  const button = find(".open", row);
  const field = document.createElement("input");
  field.value = button.firstChild.textContent;
  field.setAttribute("aria-label", say.rename);
  button.replaceWith(field);
  field.select();
  let ended = false;
  const end = async (keep) => {
    if (ended) return;
    ended = true;
    field.replaceWith(button);
    if (keep && field.value.trim() && field.value !== button.firstChild.textContent) {
      await act("rename", { chat: row.dataset.chat, text: field.value });
    }
  };
  field.onblur = () => end(true);
  field.onkeydown = (event) => {
    if (event.key === "Enter") end(true);
    if (event.key === "Escape") end(false, event.stopPropagation());
  };
}

let toasting;
function toast(text, kind = "", label = "", undo = null) {
  const box = find("#toast");
  box.className = kind;
  box.replaceChildren(text);
  if (undo) {
    const button = document.createElement("button");
    button.textContent = label;
    button.onclick = () => {
      undo();
      box.replaceChildren();
    };
    box.append(button);
  }
  clearTimeout(toasting);
  toasting = setTimeout(() => box.replaceChildren(), undo ? 10_000 : 6_000);
}

function closeSidebars() {
  for (const bar of document.querySelectorAll(".sidebar.open")) find(".toggle-button", bar)?.click();
}

// ---------------------------------------------------------------- keys and typing

function keyed(event) {
  if (event.target.closest("article form")) return; // its own keys
  const command = event.ctrlKey || event.metaKey;
  const inField = event.target.matches("input, textarea, select, [contenteditable]");
  const busy = document.body.classList.contains("busy");
  const last = [...document.querySelectorAll("#transcript article.assistant")].pop();
  const key = event.key.toLowerCase();
  let done = true;
  if (event.key === "Escape" && busy && !find("dialog[open]")) act("stop");
  else if (command && event.shiftKey && key === "o") open(fresh());
  else if (command && !event.shiftKey && key === "k") search();
  else if (command && !event.shiftKey && key === "b") press("#chats .toggle-button");
  else if (command && event.key === "Enter" && last && !busy) act("regenerate", { node: +last.dataset.id });
  else if (event.altKey && event.key === "Enter" && last && !busy) act("continue", { node: +last.dataset.id });
  else if (!inField && event.key === "?") find("#help").showModal();
  else if (event.key === "ArrowUp" && event.target === theBox() && !theBox().value && !busy) {
    find("#transcript article.user:nth-last-child(-n+2) [data-do=edit]")?.click();
  } else if (!inField && !command && event.key === "ArrowLeft" && last) find("[data-do=earlier]", last)?.click();
  else if (!inField && !command && event.key === "ArrowRight" && last) find("[data-do=later]", last)?.click();
  else done = false;
  if (event.key === "Enter" && event.target === theBox()) {
    if (event.isComposing || (busy && !event.shiftKey)) {
      // Enter ends the choice of a character; and while an answer grows, the next message waits in the box.
      event.stopImmediatePropagation();
      if (!event.isComposing) event.preventDefault();
    } else place();
  }
  if (done) {
    event.preventDefault();
    event.stopImmediatePropagation();
  }
}

function search() {
  const bar = find("#chats");
  if (!bar.classList.contains("open")) press("#chats .toggle-button");
  find("#list input").focus();
  find("#list input").select();
}

let typing;
function noted() {
  const text = theBox().value;
  document.body.classList.toggle("typed", !!text.trim());
  localStorage.setItem("draft", text);
}

function typed() {
  noted();
  const text = theBox().value;
  clearTimeout(typing);
  typing = setTimeout(weigh, 400);
}

// Let the model read what is typed, and learn whether it will fit.
async function weigh() {
  const text = theBox().value;
  if (document.body.classList.contains("busy")) return;
  try {
    const found = await ask("weigh", { chat, text, whole: false });
    if (text === theBox().value) swap(find("#files .weight"), text.trim() || find("#files .file") ? found.line : "");
  } catch {
    // not worth a word: it is asked again with the next letter
  }
}

// ---------------------------------------------------------------- the beginning

function build() {
  const button = (name, label = say[name]) =>
    `<button type="button" data-do="${name}" title="${label}" aria-label="${label}"></button>`;
  find("#list").innerHTML =
    `<div class="head"><button type="button" class="new" data-do="new">${say.new_chat}</button>` +
    `${button("new-temporary", say.new_temporary)}</div>` +
    `<input type="search" placeholder="${say.search}" aria-label="${say.search}"><nav class="rows" aria-label="${say.chats}"></nav>`;
  const bar = document.createElement("header");
  bar.id = "bar";
  bar.innerHTML = `<h1 id="title"></h1><span class="temporary-note">${say.temporary}</span>` +
    `<span class="tools">${button("light_dark")}${button("export")}${button("help")}${button("settings")}</span>`;
  const empty = document.createElement("section");
  empty.id = "empty";
  empty.innerHTML = `<h2>${say.empty_title}</h2><p>${say["empty_text_" + say.mode]}</p><div>` +
    [1, 2, 3, 4].map((n) => `<button type="button" data-do="suggest">${say["suggest_" + n]}</button>`).join("") + "</div>";
  const frame = find("#transcript");
  frame.before(bar, empty);
  frame.setAttribute("role", "log");
  frame.setAttribute("aria-live", "off"); // a screen reader is told the beginning and the end, not each word
  find("#files").innerHTML = `<div class="chips"></div><div class="weight" role="status"></div>`;
  const pick = document.createElement("button");
  pick.type = "button";
  pick.id = "attach";
  pick.dataset.do = "attach";
  pick.title = pick.ariaLabel = say.attach;
  find("#row").prepend(pick);
  const under = document.createElement("div");
  under.innerHTML = `<p id="announcer" role="status" aria-live="polite"></p><p id="toast" role="alert"></p>` +
    `<p id="lost" role="alert">${say.lost}</p>` + help() +
    `<dialog id="dialog"><div></div><button type="button" data-do="close">${say.close}</button></dialog>` +
    `<input type="file" id="pick" multiple hidden><input type="file" id="bring" accept=".json,.jsonl" hidden>` +
    `<p id="drop-here">${say.drop_here}</p>`;
  document.body.append(...under.children);
  const down = document.createElement("button");
  down.type = "button";
  down.id = "down";
  down.dataset.do = "bottom";
  down.setAttribute("aria-label", say.to_bottom);
  down.title = say.to_bottom;
  const stop = document.createElement("button");
  stop.type = "button";
  stop.id = "stop";
  stop.dataset.do = "stop";
  stop.title = stop.ariaLabel = say.stop;
  find("#composer").prepend(down);
  find("#row").append(stop);
  find("#send").setAttribute("aria-label", say.send);
}

function help() {
  const command = /Mac|iPhone|iPad/.test(navigator.platform) ? "⌘" : "Ctrl";
  const keys = [
    ["Enter", say.send], ["Shift Enter", say.key_newline], ["Esc", say.stop], [`${command} Shift O`, say.new_chat],
    [`${command} K`, say.search], [`${command} Enter`, say.regenerate], ["Alt Enter", say.continue],
    ["↑", say.key_edit], ["← →", say.key_versions], [`${command} B`, say.chats], ["?", say.help],
  ];
  return `<dialog id="help"><h2>${say.help}</h2><dl>` +
    keys.map(([key, what]) => `<dt>${key.split(" ").map((one) => `<kbd>${one}</kbd>`).join(" ")}</dt><dd>${what}</dd>`).join("") +
    `</dl><button type="button" data-do="close">${say.close}</button></dialog>`;
}

async function begin() {
  const theme = localStorage.getItem("theme");
  if (theme) document.body.classList.toggle("dark", theme === "dark");
  const needed = ["#transcript", "#box textarea", "#list", "#status", "#row", "#send", "#here textarea, #here input"];
  while (!needed.every((one) => find(one))) await sleep(20);
  for (;;) {
    try {
      say = await ask("words", {});
      break;
    } catch {
      await sleep(500);
    }
  }
  document.documentElement.lang = say.language;
  build();
  document.addEventListener("click", clicked);
  document.addEventListener("keydown", keyed, true);
  document.addEventListener("toggle", (event) => event.target.matches?.("details.thought") && wake(), true);
  document.addEventListener("visibilitychange", () => document.hidden || wake());
  window.addEventListener("scroll", scrolled, { passive: true });
  theBox().dir = "auto";
  theBox().addEventListener("input", typed);
  find("#send").addEventListener("pointerdown", place);
  find("#send").addEventListener("click", place, true);
  find("#list input").addEventListener("input", (event) => {
    query = event.target.value;
    wake();
  });
  for (const [selector, use] of [["#pick", attach], ["#bring", (files) => bringIn(files[0])]]) {
    find(selector).addEventListener("change", (event) => {
      const files = [...event.target.files];
      event.target.value = "";
      if (files.length) use(files);
    });
  }
  addEventListener("dragover", (event) => {
    if (![...event.dataTransfer.types].includes("Files")) return;
    event.preventDefault();
    document.body.classList.add("dropping");
  });
  for (const name of ["dragleave", "drop"]) {
    addEventListener(name, (event) => (name === "drop" || !event.relatedTarget) && document.body.classList.remove("dropping"));
  }
  addEventListener("drop", (event) => {
    if (!event.dataTransfer.files.length) return;
    event.preventDefault();
    attach([...event.dataTransfer.files]);
  });
  const draft = localStorage.getItem("draft");
  if (draft && !theBox().value) fill("#box", draft);
  document.body.classList.add("ready", "empty");
  open(sessionStorage.getItem("chat") || fresh());
  follow();
}

begin();
