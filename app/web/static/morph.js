// Makes one tree like another and leaves alone what is the same, so that focus, selection, scrolling and open details
// stay. Elements with an id are recognised when they moved.
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
  let at = old.firstChild;
  for (const wanted of [...fresh.childNodes]) {
    const moved = wanted.id && [...old.children].find((child) => child.id === wanted.id);
    if (moved) {
      if (moved === at) at = at.nextSibling;
      else old.insertBefore(moved, at);
      morph(moved, wanted);
    } else if (at && !at.id && !wanted.id && at.nodeName === wanted.nodeName) {
      const next = at.nextSibling;
      morph(at, wanted);
      at = next;
    } else {
      old.insertBefore(wanted, at);
    }
  }
  while (at) {
    const next = at.nextSibling;
    at.remove();
    at = next;
  }
}
