// The box: what is typed and attached, whether it will fit, and below which message it will go.

import { fill, find, swap } from "./screen.js";
import { ask, now, tell } from "./server.js";

export const theBox = () => find("#box textarea");
export const focusBox = () => matchMedia("(pointer: fine)").matches && theBox()?.focus();

// What a turn may do with the box.
export const box = {
  focus: focusBox,
  empty: () => !theBox().value.trim(),
  has: (words) => theBox().value === words,
  take: (words) => fill("#box", words),
};

// Gradio reads a hidden field: which conversation, and below which message.
export function place() {
  fill("#here", JSON.stringify({ chat: now.chat, after: now.turns.length ? now.turns[now.turns.length - 1][0] : null }));
}

let draft = ""; // as this tab last kept it
export function noted() {
  const text = theBox().value;
  document.body.classList.toggle("typed", !!text.trim());
  if (text === draft) return;
  draft = text;
  try {
    sessionStorage.setItem("draft", text); // for this tab, whatever another has in its box
    localStorage.setItem("draft", text); // for a browser that was closed
  } catch {
    // longer than the browser keeps: it is still in the box
  }
}

let typing;
function typed() {
  noted();
  clearTimeout(typing);
  typing = setTimeout(weigh, 400);
}

// Let the model read what is typed, and learn whether it will fit.
export async function weigh() {
  const text = theBox().value;
  if (document.body.classList.contains("busy")) return;
  try {
    const found = await ask("weigh", { chat: now.chat, text, whole: false });
    if (text === theBox().value) swap(find("#files .weight"), text.trim() || find("#files .file") ? found.line : "");
  } catch {
    // not worth a word: it is asked again with the next letter
  }
}

async function attach(files) {
  for (const file of files) {
    const data = await new Promise((done) => {
      const reader = new FileReader();
      reader.onload = () => done(reader.result.slice(reader.result.indexOf(",") + 1));
      reader.readAsDataURL(file);
    });
    await tell("file", { chat: now.chat, name: file.name, data: file.size ? data : "" });
  }
  weigh();
  focusBox();
}

function drops() {
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
}

// A hidden choice of files: `use` gets what was chosen.
export function chooses(selector, use) {
  find(selector).addEventListener("change", (event) => {
    const files = [...event.target.files];
    event.target.value = "";
    if (files.length) use(files);
  });
}

export function beginComposer() {
  theBox().dir = "auto";
  theBox().addEventListener("input", typed);
  find("#send").addEventListener("pointerdown", place);
  find("#send").addEventListener("click", place, true);
  chooses("#pick", attach);
  drops();
  const kept = sessionStorage.getItem("draft") ?? localStorage.getItem("draft");
  if (kept && !theBox().value) fill("#box", (draft = kept));
}
