"use strict";
(() => {
  const drawings = JSON.parse(document.getElementById("drawings").textContent);
  const dark = matchMedia("(prefers-color-scheme: dark)");
  let printing = false;  // on white, at the width that two have on a sheet

  function themed(layout) {
    const style = getComputedStyle(document.documentElement);
    const ink = printing ? "#1b1b1b" : style.getPropertyValue("--ink").trim();
    const line = printing ? "#d5d8dd" : style.getPropertyValue("--line").trim();
    const axis = { gridcolor: line, zerolinecolor: line, linecolor: line };
    const scene = Object.fromEntries(Object.entries(layout.scene ?? {}).map(([side, one]) => [side, { ...one, ...axis }]));
    return {
      ...layout,
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { color: ink, family: "system-ui, sans-serif", size: 12 },
      xaxis: { ...layout.xaxis, ...axis }, yaxis: { ...layout.yaxis, ...axis },
      ...(layout.scene && { scene }),
      margin: { l: 60, r: 15, t: 15, b: 50, ...layout.margin },
      legend: { orientation: "h", yref: "container", y: 0, yanchor: "bottom" },
    };
  }

  function draw(place) {
    const { data, layout, high } = drawings[place.dataset.chart];
    const width = printing ? 470 : place.clientWidth;
    const label = 60 + 7 * Math.max(...data.map(({ name }) => (name ?? "").length));  // px
    const showlegend = data.length > 1 && data.length <= 24;
    const lines = showlegend ? Math.ceil(data.length / Math.max(1, Math.floor((width - 75) / label))) : 0;
    const whole = { ...themed(layout), height: high + 20 * lines, showlegend };
    if (printing) whole.width = width;
    return Plotly.react(place, data, whole, { responsive: true, displayModeBar: false }).then(() => place.classList.add("drawn"));
  }

  const places = [...document.querySelectorAll(".chart")];
  const seen = new IntersectionObserver((entries) => {
    for (const { isIntersecting, target } of entries)
      if (isIntersecting) { seen.unobserve(target); draw(target); }
  }, { rootMargin: "300px" });
  for (const place of places) { place.style.minHeight = drawings[place.dataset.chart].high + "px"; seen.observe(place); }
  dark.addEventListener("change", () => places.filter((p) => p.classList.contains("drawn")).forEach(draw));
  window.drawAll = () => Promise.all(places.map(draw));
  for (const [event, begins] of [["beforeprint", true], ["afterprint", false]])
    addEventListener(event, () => { printing = begins; window.drawAll(); });

  for (const table of document.querySelectorAll("table.sortable")) {
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, column) => head.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "descending";
      heads.forEach((one) => one.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "ascending" : "descending");
      const value = (row) => {
        const cell = row.cells[column];
        const given = cell.dataset.value ?? cell.textContent;
        const number = parseFloat(given);
        return Number.isNaN(number) ? given : number;
      };
      const rows = [...table.tBodies[0].rows];
      rows.sort((one, two) => {
        const a = value(one), b = value(two);
        if (a === "" || b === "") return (a === "") - (b === "");  // empty cells stay last
        const order = typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b));
        return down ? order : -order;
      });
      table.tBodies[0].append(...rows);
    }));
  }

  for (const room of document.querySelectorAll(".samples")) {
    const [search, select, output, table] = ["input", "select", "output", "table"].map((n) => room.querySelector(n));
    const more = room.querySelector(".tools > button");
    let most;
    function show(rows) {
      most = rows;
      const all = [...table.tBodies[0].rows], wanted = search.value.toLowerCase();
      const rule = select.value ? `[data-is~="${select.value}"]` : "tr";
      const found = all.filter((row) => row.matches(rule) && row.textContent.toLowerCase().includes(wanted));
      for (const row of all) row.hidden = true;
      for (const row of found.slice(0, most)) row.hidden = false;
      output.textContent = `${found.length} of ${all.length}`;
      more.hidden = found.length <= most;
    }
    for (const one of [search, select]) one.addEventListener("input", () => show(25));
    table.tHead.addEventListener("click", () => show(most));  // after its rows were sorted
    more.addEventListener("click", () => show(most + 100));
    show(25);
  }

  if (STATE !== null) {  // a server has newer pages
    setInterval(async () => {
      try {
        const state = await (await fetch("state", { cache: "no-store" })).text();
        if (state !== STATE) {
          sessionStorage.setItem("place", String(scrollY));
          location.reload();
        }
      } catch { /* the server has stopped; what is shown stays */ }
    }, 3000);
    scrollTo(0, Number(sessionStorage.getItem("place") ?? 0));
  }
})();
