"use strict";
// Without this script, all images are shown.
(() => {
  const PER_PAGE = { phone: 4, desktop: 12 };
  const NARROWEST = 1.4; // ratio of a pair: higher pictures have margins
  const phone = matchMedia("(max-width: 700px)");
  const choice = document.getElementById("class");
  const sections = [...document.querySelectorAll("section")].map((section) => ({ section, page: 0 }));

  function show(one) {
    const find = (selector) => one.section.querySelector(selector);
    const figures = [...one.section.querySelectorAll("figure")];
    const matching = figures.filter((figure) => !choice.value || figure.dataset.classes.split(" ").includes(choice.value));
    const size = phone.matches ? PER_PAGE.phone : PER_PAGE.desktop;
    const pages = Math.max(1, Math.ceil(matching.length / size));
    one.page = Math.min(Math.max(one.page, 0), pages - 1);
    const visible = new Set(matching.slice(one.page * size, (one.page + 1) * size));
    for (const figure of figures) figure.hidden = !visible.has(figure);
    find(".nothing").hidden = matching.length > 0;
    find(".pager").hidden = pages === 1;
    find("output").textContent = `${one.page + 1} of ${pages}`;
    find("[value='-1']").disabled = one.page === 0;
    find("[value='1']").disabled = one.page === pages - 1;
  }
  const showAll = () => sections.forEach(show);

  for (const figure of document.querySelectorAll("figure")) {
    const ratios = [...figure.querySelectorAll("img")].map((image) => image.getAttribute("width") / image.getAttribute("height"));
    const total = ratios.reduce((sum, ratio) => sum + ratio, 0);
    figure.style.setProperty("--ratio", Math.max(total, NARROWEST).toFixed(3));
  }
  for (const one of sections) {
    for (const button of one.section.querySelectorAll("button")) {
      button.addEventListener("click", () => {
        one.page += Number(button.value);
        show(one);
        one.section.scrollIntoView();
      });
    }
  }
  choice.addEventListener("change", () => {
    for (const one of sections) one.page = 0;
    showAll();
  });
  phone.addEventListener("change", showAll);
  document.getElementById("filter").hidden = false;
  showAll();
})();
