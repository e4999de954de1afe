// Keeps a live page up to date: asks the server for sections that are new and puts them in place.
//
// What the reader has done to the page is kept: zoom, unfolded details, scroll positions, the focus.
"use strict";
(() => {
  const bar = document.querySelector(".live"), told = bar.querySelector("b"), ago = bar.querySelector("span");
  const { version, command } = bar.dataset, units = JSON.parse(bar.dataset.units);
  let stamp = bar.dataset.stamp, every = 3000, timer = 0, asking = false;
  let silent = null, heard = 0, lost = null, pointer = null, pressed = false;

  const duration = (seconds) => {
    const total = Math.round(Math.max(0, seconds));
    for (const [length, unit, part, name] of units)
      if (total >= length) return `${Math.floor(total / length)} ${unit} ${Math.floor(total % length / part)} ${name}`;
    return total + " s";
  };
  const tick = () => {
    ago.textContent = lost !== null || silent === null ? ""
      : "wrote " + duration(silent + (performance.now() - heard) / 1000) + " ago";
  };

  // The child indices that lead from one element to another inside it, to find its counterpart in a replacement.
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

  const sectionsNow = () => new Map([...document.querySelectorAll("main > [id]")].map((one) => [one.id, one]));
  const put = ({ order, sections }) => {
    const before = sectionsNow(), anchor = [...before].find(([, one]) => one.getBoundingClientRect().bottom > 60);
    const top = anchor?.[1].getBoundingClientRect().top, restore = [];
    for (const [name, html] of Object.entries(sections)) {
      const holder = document.createElement("template");
      holder.innerHTML = html;
      const fresh = holder.content.firstElementChild;
      if (before.has(name)) restore.push(replace(before.get(name), fresh));
      else bar.parentElement.append(fresh);
    }
    let last = bar;
    const now = sectionsNow();
    for (const name of order) {
      const section = now.get(name);
      if (section && last.nextElementSibling !== section) last.after(section);
      last = section ?? last;
      now.delete(name);
    }
    now.forEach((section) => section.remove());
    if (Object.keys(sections).length) start();  // the page's own script: charts respond, zoomed as before
    restore.forEach((again) => again());
    const moved = anchor && sectionsNow().get(anchor[0]);
    if (moved && window.scrollY > 0) window.scrollBy(0, moved.getBoundingClientRect().top - top);
    if (pointer) document.elementFromPoint(...pointer)?.dispatchEvent(
      new PointerEvent("pointermove", { clientX: pointer[0], clientY: pointer[1], bubbles: true }));
  };
  // Sections that the reader is selecting or dragging over are not replaced yet: they wait here.
  const waiting = {};
  let order = [];
  const selected = (name) => getSelection().type === "Range" && sectionsNow().has(name)
    && getSelection().containsNode(sectionsNow().get(name), true);
  const settle = () => {
    const ready = Object.keys(waiting).filter((name) => !selected(name));
    const over = order.length > 0 && [...sectionsNow().keys()].some((name) => !order.includes(name));
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
    if (news.version !== version) { location.reload(); return; }
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
