"use strict";
(() => {
  const root = document.documentElement;
  const button = document.getElementById("theme");
  const themes = { auto: "as the system", light: "light", dark: "dark" };
  const remember = (theme) => { try { localStorage.setItem("rmipo-report-theme", theme); } catch { /* a page of a file may have no storage */ } };
  const remembered = () => { try { return localStorage.getItem("rmipo-report-theme"); } catch { return null; } };
  const show = (theme) => {
    if (theme === "auto") delete root.dataset.theme; else root.dataset.theme = theme;
    button.textContent = `colours: ${theme}`;
    button.setAttribute("aria-label", `colours: ${themes[theme]}`);
  };
  let theme = remembered() in themes ? remembered() : "auto";
  show(theme);
  button.addEventListener("click", () => {
    const names = Object.keys(themes);
    theme = names[(names.indexOf(theme) + 1) % names.length];
    show(theme);
    remember(theme);
  });

  // The contents lie beside the text where there is room for them, else folded above it.
  const contents = document.querySelector("nav details");
  const wide = matchMedia("(min-width: 1080px)");
  const fold = () => { contents.open = wide.matches; };
  wide.addEventListener("change", fold);
  fold();

  const short = (value) => {
    const size = Math.abs(value);
    if (size >= 1e6 || (size > 0 && size < 1e-3)) return value.toExponential(2);
    return size >= 100 ? Math.round(value).toLocaleString("en") : String(Number(value.toPrecision(4)));
  };

  for (const figure of document.querySelectorAll(".chart")) {
    const data = JSON.parse(figure.querySelector("script").textContent);
    const plot = figure.querySelector(".plot"), readout = figure.querySelector(".readout"), cursor = figure.querySelector(".cursor");
    const steps = [...new Set(data.series.flatMap((series) => series.points.map((point) => point[0])))].sort((a, b) => a - b);
    const [low, high, left, right, width] = data.x;
    let at = -1;
    const look = (number) => {
      at = Math.max(0, Math.min(steps.length - 1, number));
      const step = steps[at], x = left + ((step - low) / (high - low || 1)) * (right - left);
      cursor.setAttribute("x1", x);
      cursor.setAttribute("x2", x);
      cursor.removeAttribute("hidden");
      const values = data.series.map((series) => {
        const before = series.points.filter((point) => point[0] <= step);
        return before.length ? `${series.label} ${short(before[before.length - 1][1])}`.trim() : null;
      });
      readout.textContent = `step ${step.toLocaleString("en")}: ${values.filter(Boolean).join(" \u00b7 ")}`;
    };
    const leave = () => { cursor.setAttribute("hidden", ""); readout.textContent = ""; };
    plot.addEventListener("pointermove", (event) => {
      const box = plot.getBoundingClientRect();
      const step = low + (((event.clientX - box.left) / box.width * width - left) / (right - left)) * (high - low);
      let best = 0;
      steps.forEach((one, number) => { if (Math.abs(one - step) < Math.abs(steps[best] - step)) best = number; });
      look(best);
    });
    plot.addEventListener("pointerleave", leave);
    plot.addEventListener("blur", leave);
    plot.addEventListener("keydown", (event) => {
      const moves = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: steps.length - 1 };
      if (event.key in moves) { look(moves[event.key]); event.preventDefault(); }
    });
  }

  const tip = document.getElementById("tip");
  const told = (token) => {
    const [logp, alone] = token.dataset.v.split(" ").map(Number);
    const words = [`log p ${logp.toFixed(2)} (p ${Math.exp(logp).toPrecision(2)})`];
    if (alone !== undefined) words.push(`without prompt ${alone.toFixed(2)}`, `PMI ${logp - alone >= 0 ? "+" : ""}${(logp - alone).toFixed(2)}`);
    return words.join(" \u00b7 ");
  };
  const point = (token) => {
    document.querySelectorAll(".now").forEach((one) => one.classList.remove("now"));
    tip.hidden = !token;
    if (!token) return;
    token.classList.add("now");
    tip.textContent = told(token);
    const box = token.getBoundingClientRect();
    tip.style.left = `${Math.max(4, Math.min(box.left, innerWidth - tip.offsetWidth - 4))}px`;
    tip.style.top = `${box.top > tip.offsetHeight + 8 ? box.top - tip.offsetHeight - 6 : box.bottom + 6}px`;
  };
  for (const text of document.querySelectorAll("p.tokens")) {
    const tokens = [...text.children];
    text.addEventListener("pointerover", (event) => point(event.target.closest("[data-v]")));
    text.addEventListener("pointerleave", () => point(null));
    text.addEventListener("blur", () => point(null));
    text.addEventListener("keydown", (event) => {
      const at = tokens.findIndex((token) => token.classList.contains("now"));
      const moves = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: tokens.length - 1 };
      if (event.key in moves) { point(tokens[Math.max(0, Math.min(tokens.length - 1, moves[event.key]))]); event.preventDefault(); }
    });
  }
  addEventListener("scroll", () => point(null), { passive: true });
  for (const choice of document.querySelectorAll("input[name=mode]")) {
    choice.addEventListener("change", () => {
      document.querySelectorAll("p.tokens").forEach((text) => text.classList.toggle("by-surprise", choice.value === "surprise"));
    });
  }
})();
