"use strict";
(() => {
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const tip = document.getElementById("tip");
  const state = {};
  document.documentElement.classList.add("js");

  // Switches: a button sets one key; what is shown only under other values hides.
  const show = () => {
    for (const element of all("[data-when]")) {
      element.hidden = !element.dataset.when.split(" ").every((condition) => {
        const [key, values] = condition.split("=");
        return !(key in state) || values.split("|").includes(state[key]);
      });
    }
    for (const button of all("[data-set]")) {
      const [key, value] = button.dataset.set.split("=");
      button.setAttribute("aria-pressed", String(state[key] === value));
    }
  };
  for (const button of all('[data-set][aria-pressed="true"]')) {
    const [key, value] = button.dataset.set.split("=");
    state[key] = value;
  }
  show();

  // Models: a toggle hides a series in every chart and table; its button stays.
  const toggle = (button, shown) => {
    button.setAttribute("aria-pressed", String(shown));
    for (const element of all(`[data-series="${button.dataset.toggle}"]`)) {
      element.classList.toggle("off", !shown);
    }
  };

  // Sorting: absent values last, ties in the order they had.
  const sort = (head, button) => {
    const row = head.parentElement;
    const place = [...row.children].indexOf(head);
    const number = head.dataset.sort === "number";
    const now = head.getAttribute("aria-sort");
    const down = now ? now === "ascending" : number;
    for (const other of row.children) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const value = (line) => {
      const cell = line.children[place];
      if (number) return "value" in cell.dataset ? Number(cell.dataset.value) : parseFloat(cell.textContent);
      return cell.textContent;
    };
    const body = head.closest("table").tBodies[0];
    const lines = [...body.rows].sort((a, b) => {
      const [left, right] = [value(a), value(b)];
      if (number && (isNaN(left) || isNaN(right))) return isNaN(left) - isNaN(right);
      const order = number ? left - right : left.localeCompare(right);
      return down ? -order : order;
    });
    body.append(...lines);
    button.focus();
  };
  for (const head of all("th[data-sort]")) {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => sort(head, button));
  }

  // Tips: what was a title shows at once, on hover, focus and tap.
  for (const element of all("[title]")) {
    element.dataset.tip = element.title;
    element.removeAttribute("title");
  }
  for (const title of all(".mark > title")) {
    const mark = title.parentElement;
    mark.dataset.tip = title.textContent;
    mark.setAttribute("aria-label", title.textContent);
    title.remove();
  }
  const say = (target) => {
    tip.hidden = !target;
    if (!target) return;
    tip.textContent = target.dataset.tip;
    const [box, own] = [target.getBoundingClientRect(), tip.getBoundingClientRect()];
    const width = document.documentElement.clientWidth;
    const left = Math.min(Math.max(8, box.x + box.width / 2 - own.width / 2), width - own.width - 8);
    const above = box.y - own.height - 8;
    tip.style.left = `${left}px`;
    tip.style.top = `${above > 8 ? above : box.bottom + 8}px`;
  };
  const tipped = (event) => (event.target.closest ? event.target.closest("[data-tip]") : null);
  document.addEventListener("pointerover", (event) => say(tipped(event)));
  document.addEventListener("focusin", (event) => say(tipped(event)));
  document.addEventListener("scroll", () => say(null), { passive: true, capture: true });

  document.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (button && button.dataset.set) {
      const [key, value] = button.dataset.set.split("=");
      state[key] = value;
      show();
    } else if (button && button.dataset.toggle) {
      toggle(button, button.getAttribute("aria-pressed") !== "true");
    } else if (button && button.dataset.every) {
      for (const other of all("[data-toggle]")) toggle(other, button.dataset.every === "show");
    }
    say(tipped(event));
  });

  // A chart is one stop of the tab key; the arrows go from mark to mark.
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") say(null);
    const chart = event.target.closest("svg.chart");
    const steps = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 };
    if (!chart || !(event.key in steps)) return;
    const marks = all(".mark", chart).filter((mark) => mark.getClientRects().length);
    if (!marks.length) return;
    event.preventDefault();
    const at = marks.indexOf(event.target);
    const next = at < 0 ? 0 : (at + steps[event.key] + marks.length) % marks.length;
    marks[next].focus({ preventScroll: true });
  });
})();
