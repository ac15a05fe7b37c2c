const draw = box => {
  const kept = box.querySelector("template");
  if (kept) { kept.remove(); box.append(document.importNode(kept.content, true)); }
};
const near = new IntersectionObserver(
  seen => seen.filter(one => one.isIntersecting).forEach(one => draw(one.target)),
  { rootMargin: "700px" });
const boxes = document.querySelectorAll(".s3pet-lab");
boxes.forEach(box => near.observe(box));
addEventListener("beforeprint", () => boxes.forEach(draw));
