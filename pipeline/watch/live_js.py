"""How a live page stays alive: the style of its bar, and the script that asks for what is new and puts it in place.

What the reader has done to the page stays: zoom, unfolded parts, places scrolled to, the focus.
"""

import json

_STYLE = """
.live { position: sticky; top: 0; z-index: 5; margin: -12px -8px 20px; padding: 9px 8px 9px 27px;
  background: var(--page); border-bottom: 1px solid var(--line); font-size: 14px; overflow-wrap: anywhere;
  font-variant-numeric: tabular-nums; --dot: var(--t0); }
.live::before { content: ""; position: absolute; left: 8px; top: 15px; width: 9px; height: 9px; border-radius: 9px;
  background: var(--dot); }
.live b { font-weight: 620; margin-right: 10px; }
.live span { color: var(--soft); }
.live[data-state=running], .live[data-state=finished] { --dot: var(--good); }
.live[data-state=running]::before { animation: live 2s ease-in-out infinite; }
.live[data-state=started], .live[data-state=waiting] { --dot: var(--t5); }
.live[data-state=silent], .live[data-state=gone] { --dot: var(--t6); }
.live[data-state=gone] b { color: var(--t6); }
@keyframes live { 50% { opacity: .3; } }
@media (prefers-reduced-motion: reduce) { .live::before { animation: none !important; } }
@media print { .live { display: none; } }
"""

_SCRIPT = """
"use strict";
(() => {
  document.head.append(Object.assign(document.createElement("style"), { textContent: STYLE }));
  const bar = document.querySelector(".live"), told = bar.querySelector("b"), ago = bar.querySelector("span");
  const { look, command } = bar.dataset;
  let stamp = bar.dataset.stamp, every = 3000, timer = 0, asking = false;
  let silent = null, heard = 0, lost = null, pointer = null, pressed = false;

  const duration = (seconds) => {
    const total = Math.round(Math.max(0, seconds));
    for (const [length, unit, part, name] of [[86400, "d", 3600, "h"], [3600, "h", 60, "min"], [60, "min", 1, "s"]])
      if (total >= length) return `${Math.floor(total / length)} ${unit} ${Math.floor(total % length / part)} ${name}`;
    return total + " s";
  };
  const tick = () => {
    ago.textContent = lost !== null || silent === null ? ""
      : "wrote " + duration(silent + (performance.now() - heard) / 1000) + " ago";
  };

  // Where an element is in another, to find its like in the one that comes in its place.
  const way = (from, to) => {
    const steps = [];
    for (let at = to; at !== from; at = at.parentElement) steps.unshift([...at.parentElement.children].indexOf(at));
    return steps;
  };
  const go = (from, steps) => steps.reduce((at, step) => at && at.children[step], from);
  const summary = (details) => details.querySelector("summary")?.firstChild?.textContent ?? "";
  const replace = (old, fresh) => {
    const open = new Map([...old.querySelectorAll("details")].map((one) => [summary(one), one.open]));
    fresh.querySelectorAll("details").forEach((one) => {
      if (open.has(summary(one))) one.open = open.get(summary(one));
    });
    const moved = [...old.querySelectorAll("*")].filter((one) => one.scrollLeft || one.scrollTop)
      .map((one) => [way(old, one), one.scrollLeft, one.scrollTop]);
    const focus = old.contains(document.activeElement) ? way(old, document.activeElement) : null;
    old.replaceWith(fresh);
    return () => {
      for (const [steps, left, top] of moved) {
        const one = go(fresh, steps);
        if (one) { one.scrollLeft = left; one.scrollTop = top; }
      }
      if (focus) go(fresh, focus)?.focus({ preventScroll: true });
    };
  };

  const parts = () => new Map([...document.querySelectorAll("[data-part]")].map((part) => [part.dataset.part, part]));
  const put = ({ order, sections }) => {
    const before = parts(), anchor = [...before].find(([, part]) => part.getBoundingClientRect().bottom > 60);
    const top = anchor?.[1].getBoundingClientRect().top, restore = [];
    for (const [name, html] of Object.entries(sections)) {
      const holder = document.createElement("template");
      holder.innerHTML = html;
      const fresh = holder.content.firstElementChild;
      if (before.has(name)) restore.push(replace(before.get(name), fresh));
      else bar.parentElement.append(fresh);
    }
    let last = bar;
    const now = parts();
    for (const name of order) {
      const part = now.get(name);
      if (part && last.nextElementSibling !== part) last.after(part);
      last = part ?? last;
      now.delete(name);
    }
    now.forEach((part) => part.remove());
    if (Object.keys(sections).length) start();  // the page's own script: charts respond, zoomed as before
    restore.forEach((again) => again());
    const moved = anchor && parts().get(anchor[0]);
    if (moved && window.scrollY > 0) window.scrollBy(0, moved.getBoundingClientRect().top - top);
    if (pointer) document.elementFromPoint(...pointer)?.dispatchEvent(
      new PointerEvent("pointermove", { clientX: pointer[0], clientY: pointer[1], bubbles: true }));
  };
  // What is selected, or dragged over, is not taken away meanwhile: it waits here.
  const waiting = {};
  let order = [];
  const selected = (name) => getSelection().type === "Range" && parts().has(name)
    && getSelection().containsNode(parts().get(name), true);
  const settle = () => {
    const ready = Object.keys(waiting).filter((name) => !selected(name));
    const over = order.length > 0 && [...parts().keys()].some((name) => !order.includes(name));
    if (pressed || !(ready.length || over)) return;
    const sections = Object.fromEntries(ready.map((name) => [name, waiting[name]]));
    ready.forEach((name) => delete waiting[name]);
    put({ order, sections });
  };
  const take = (news) => {
    Object.assign(waiting, news.sections);
    for (const name of Object.keys(waiting)) if (!news.order.includes(name)) delete waiting[name];
    stamp = news.stamp; order = news.order;
    settle();
  };
  const show = ({ state, words, seconds, title, every: pause }) => {
    bar.dataset.state = state; told.textContent = words; document.title = title;
    silent = seconds; heard = performance.now(); every = pause; lost = null; tick();
  };
  const miss = () => {
    lost ??= new Date().toLocaleTimeString();
    bar.dataset.state = "gone";
    told.textContent = `No answer from this page's server since ${lost}. Start it again: ${command}`;
    tick();
  };
  const ask = async () => {
    clearTimeout(timer);
    if (document.hidden || asking) return;
    asking = true;
    let news = null;
    try {
      const answer = await fetch("live?since=" + encodeURIComponent(stamp), { signal: AbortSignal.timeout(20000) });
      if (answer.ok) news = await answer.json();
    } catch { }
    asking = false;
    timer = setTimeout(ask, every);
    if (news === null) { miss(); return; }
    if (news.look !== look) { location.reload(); return; }
    show(news.status);
    take(news);
  };
  document.addEventListener("visibilitychange", ask);
  document.addEventListener("pointermove", (event) => {
    if (!event.isTrusted) return;
    pointer = [event.clientX, event.clientY];
    pressed &&= event.buttons !== 0;  // let go outside of the window
  });
  document.addEventListener("pointerdown", () => { pressed = true; }, true);
  for (const kind of ["pointerup", "pointercancel"]) document.addEventListener(kind, () => { pressed = false; }, true);
  setInterval(() => { tick(); settle(); }, 1000);
  ask();
})();
"""
SCRIPT = _SCRIPT.replace("STYLE", json.dumps(_STYLE))
