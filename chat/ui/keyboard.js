// The keys: what they do, and the list of them.

import { deeds as chats, search } from "./chats.js";
import { place, theBox } from "./composer.js";
import { find } from "./screen.js";
import { act, say } from "./server.js";

export function keyed(event) {
  if (event.target.closest("article form")) return; // its own keys
  const command = event.ctrlKey || event.metaKey;
  const inField = event.target.matches("input, textarea, select, [contenteditable]");
  const busy = document.body.classList.contains("busy");
  const over = find("dialog[open]"); // a dialog has the keys to itself
  const last = [...document.querySelectorAll("#transcript article.assistant")].pop();
  const key = event.key.toLowerCase();
  if (over) return;
  let done = true;
  if (event.key === "Escape" && busy) act("stop");
  else if (command && event.shiftKey && key === "o") chats.new();
  else if (command && !event.shiftKey && key === "k") search();
  else if (command && !event.shiftKey && key === "b") chats.chats();
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

export function help() {
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
