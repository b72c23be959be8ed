"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const cards = new Map([...document.querySelectorAll(".card")].map((card) => [Number(card.dataset.index), card]));
const LISTED = 200; // rows of the list

// A column of a table's numbers: the first click sorts upward, the next one downward. Missing numbers stay last.
for (const table of document.querySelectorAll("table.sortable")) {
  const titles = [...table.tHead.rows[0].cells];
  for (const [column, title] of titles.entries()) {
    title.querySelector("button")?.addEventListener("click", () => {
      const sign = title.ariaSort === "ascending" ? -1 : 1;
      for (const other of titles) other.ariaSort = null;
      title.ariaSort = sign === 1 ? "ascending" : "descending";
      const value = (row) => {
        const text = row.cells[column].dataset.value;
        return text === "" ? sign * Infinity : Number(text);
      };
      const rows = [...table.tBodies[0].rows];
      rows.sort((a, b) => {
        const [one, two] = [value(a), value(b)];
        return one === two ? 0 : sign * (one - two);
      });
      table.tBodies[0].append(...rows);
    });
  }
}

const chosenClass = () => byId("class").value;
const column = () => Number(byId("column")?.value ?? 0);

function valueOf(row) {
  const values = chosenClass() === "" ? row.values : row.classes[chosenClass()];
  return values?.[column()] ?? null;
}

function wrongOf(row) {
  return chosenClass() === "" ? row.wrong_total : (row.wrong[chosenClass()] ?? 0);
}

function format(value) {
  if (value === null) return "–";
  const digits = Math.abs(value).toFixed(3);
  return data.signed ? (value < 0 ? "−" : "+") + digits : digits;
}

// The order of images without a value: last.
const KEYS = {
  low: (row) => valueOf(row) ?? Infinity,
  high: (row) => -(valueOf(row) ?? -Infinity),
  change: (row) => -Math.abs(valueOf(row) ?? 0),
  wrong: (row) => -wrongOf(row),
  name: () => 0,
};

function chosenImages() {
  const words = byId("search").value.toLowerCase();
  const key = KEYS[byId("order").value];
  return data.rows
    .map((row, index) => ({ row, index, key: key(row) }))
    .filter(({ row }) => row.name.toLowerCase().includes(words) && (chosenClass() === "" || row.classes[chosenClass()]))
    .sort((a, b) => (a.key === b.key ? 0 : a.key - b.key) || (a.row.name < b.row.name ? -1 : 1));
}

function cell(text) {
  const element = document.createElement("td");
  element.append(text);
  return element;
}

function update() {
  const images = chosenImages();
  const className = chosenClass() === "" ? null : byId("class").selectedOptions[0].text;
  const title = `${data.signed ? "change of " : ""}${className === null ? "mIoU" : `IoU of ${className}`}`;
  const shown = images.filter(({ index }) => cards.has(index));
  const hidden = new Set(cards.keys());
  for (const { row, index } of shown) {
    const card = cards.get(index);
    const wrong = data.signed ? "" : `, ${wrongOf(row).toLocaleString("en")} wrong pixels`;
    card.querySelector(".value").textContent = `${title} ${format(valueOf(row))}${wrong}`;
    card.hidden = false;
    hidden.delete(index);
    byId("cards").append(card);
  }
  for (const index of hidden) cards.get(index).hidden = true;
  const having = className === null ? "" : ` with ${className}`;
  const which = className === null ? "" : `: those with ${className}`;
  byId("status").textContent = cards.size === 0 ? "" : `${shown.length} of ${cards.size} images shown${which}`;

  byId("value-title").textContent = title;
  const rows = images.slice(0, LISTED).map(({ row, index }) => {
    const line = document.createElement("tr");
    const name = document.createElement("bdi");
    name.textContent = row.name;
    line.append(cell(name), cell(format(valueOf(row))));
    if (!data.signed) line.append(cell(wrongOf(row).toLocaleString("en")));
    const link = document.createElement("a");
    if (cards.has(index)) {
      link.href = `#image-${index}`;
      link.textContent = "show";
    }
    line.append(cell(link));
    return line;
  });
  byId("scores").tBodies[0].replaceChildren(...rows);
  const some = images.length > LISTED ? `the first ${LISTED} of ` : "";
  byId("table-status").textContent = `These are ${some}${images.length.toLocaleString("en")} images${having}.`;
}

for (const id of ["class", "order", "search", "column"]) byId(id)?.addEventListener("input", update);
byId("column")?.addEventListener("input", () => {
  const layers = [...document.querySelectorAll("input[name=layer]")];
  const first = layers.length - byId("column").length; // of the layers that show changes
  if (layers.findIndex((layer) => layer.checked) >= first) {
    layers[first + column()].checked = true;
    showLayer();
  }
});
byId("controls").addEventListener("submit", (event) => event.preventDefault());

function showLayer() {
  const layer = document.querySelector("input[name=layer]:checked").value;
  for (const image of document.querySelectorAll(".layer")) image.hidden = image.dataset.layer !== layer;
}

function fade() {
  document.body.style.setProperty("--opacity", byId("opacity").value / 100);
  byId("opacity-value").textContent = `${byId("opacity").value} %`;
}

const viewer = byId("viewer");
let enlarged = null;

function enlarge(card) {
  if (!card) return;
  enlarged = card;
  const copy = card.cloneNode(true);
  copy.removeAttribute("id");
  const stack = document.createElement("div");
  stack.className = "stack";
  stack.append(...copy.querySelectorAll("img"));
  const photo = stack.querySelector(".photo");
  stack.style.setProperty("--shape", photo.getAttribute("width") / photo.getAttribute("height"));
  copy.querySelector("button").replaceWith(stack);
  byId("viewer-image").replaceChildren(copy);
  if (!viewer.open) viewer.showModal();
}

// The next card in the order of the gallery, or the one before it.
function turn(step) {
  const shown = [...document.querySelectorAll("#cards .card:not([hidden])")];
  enlarge(shown[shown.indexOf(enlarged) + step]);
}

if (cards.size) {
  byId("layers").addEventListener("change", showLayer);
  byId("opacity").addEventListener("input", fade);
  byId("size").addEventListener("input", () => (byId("cards").className = `gallery ${byId("size").value}`));
  for (const card of cards.values()) card.querySelector("button").addEventListener("click", () => enlarge(card));
  byId("previous").addEventListener("click", () => turn(-1));
  byId("next").addEventListener("click", () => turn(1));
  byId("close").addEventListener("click", () => viewer.close());
  viewer.addEventListener("close", () => {
    byId("viewer-image").replaceChildren();
    enlarged.querySelector("button").focus();
  });
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.altKey || event.metaKey || event.target.type === "search") return;
    const layer = document.querySelector(`input[name=layer][value="${event.key - 1}"]`);
    if (/^\d$/.test(event.key) && layer) {
      layer.checked = true;
      showLayer();
    } else if (viewer.open && event.key === "ArrowLeft") turn(-1);
    else if (viewer.open && event.key === "ArrowRight") turn(1);
  });
  showLayer();
  fade();
}
update();
