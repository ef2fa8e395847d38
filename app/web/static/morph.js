// Makes one tree like another and leaves alone what is the same, so that focus, selection, scrolling and open details
// stay. An element loses its focus when it is moved, so what is in the way is taken out instead.
export function morph(old, fresh) {
  if (old.isEqualNode(fresh)) return;
  if (old.nodeType !== fresh.nodeType || old.nodeName !== fresh.nodeName) return old.replaceWith(fresh);
  if (old.nodeType !== Node.ELEMENT_NODE) {
    old.nodeValue = fresh.nodeValue;
    return;
  }
  for (const { name } of [...old.attributes]) {
    // What the reader opened.
    if (!fresh.hasAttribute(name) && name !== "open") old.removeAttribute(name);
  }
  for (const { name, value } of fresh.attributes) {
    if (old.getAttribute(name) !== value) old.setAttribute(name, value);
  }
  // What the reader typed or chose.
  if (["INPUT", "SELECT", "TEXTAREA"].includes(old.nodeName)) return;

  const ids = new Set([...fresh.children].map((child) => child.id));
  let at = old.firstChild;
  for (const wanted of [...fresh.childNodes]) {
    const found = counterpart(old, at, wanted);
    if (!found) {
      old.insertBefore(wanted, at);
      continue;
    }
    for (let node = at; node !== found; ) {
      const next = node.nextSibling;
      if (!node.id || !ids.has(node.id)) {
        if (node === at) at = next;
        node.remove();
      }
      node = next;
    }
    if (found === at) at = at.nextSibling;
    else old.insertBefore(found, at); // others with an id stand before it that come later now
    morph(found, wanted);
  }
  while (at) {
    const next = at.nextSibling;
    at.remove();
    at = next;
  }
}

// What was `wanted` before, among the children from `at` on: by id, else the next of its sort.
function counterpart(old, at, wanted) {
  if (wanted.nodeType !== Node.ELEMENT_NODE) return at?.nodeType === wanted.nodeType ? at : null;
  const same = (node) => node.nodeName === wanted.nodeName && (node.id ?? "") === wanted.id;
  for (let node = at; node; node = node.nextSibling) {
    if (same(node) && (wanted.id || node.getAttribute("class") === wanted.getAttribute("class"))) return node;
  }
  return at && same(at) ? at : null;
}
