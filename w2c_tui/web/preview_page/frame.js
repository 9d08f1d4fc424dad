"use strict";
// Runs inside the sandboxed frame and is the only script that may. It takes pages from the shell
// and puts them into the document, changing only what differs: nothing flickers, and the place to
// which the user has scrolled stays.
//
// A page may name its elements after properties of documents and forms ("documentElement",
// "childNodes"), which hides them; therefore these are read through their prototypes.
(() => {
  const get = (type, name) =>
    Function.prototype.call.bind(Object.getOwnPropertyDescriptor(type.prototype, name).get);
  const method = (type, name) => Function.prototype.call.bind(type.prototype[name]);
  const rootOf = get(Document, "documentElement");
  const firstChild = get(Node, "firstChild");
  const nextSibling = get(Node, "nextSibling");
  const nodeType = get(Node, "nodeType");
  const nodeName = get(Node, "nodeName");
  const attributesOf = get(Element, "attributes");
  const appendChild = method(Node, "appendChild");
  const removeChild = method(Node, "removeChild");
  const replaceChild = method(Node, "replaceChild");
  const setAttribute = method(Element, "setAttributeNS");
  const getAttribute = method(Element, "getAttributeNS");
  const hasAttribute = method(Element, "hasAttributeNS");
  const removeAttribute = method(Element, "removeAttributeNS");
  const removePlain = method(Element, "removeAttribute");
  const select = method(Element, "querySelectorAll");
  const remove = method(Element, "remove");
  const closest = method(Element, "closest");
  const compatMode = get(Document, "compatMode");

  const shell = location.origin;
  const root = rootOf(document);
  const isQuirky = compatMode(document) === "BackCompat";
  const largeInCharacters = 1_000_000;
  const tell = (message) => parent.postMessage(message, shell);

  // The page is as wide as the screenshot only without a scroll bar.
  const sheet = new CSSStyleSheet();
  sheet.replaceSync("html { scrollbar-width: none !important }");
  document.adoptedStyleSheets = [sheet];

  function place(html) {
    const next = new DOMParser().parseFromString(html, "text/html");
    if ((compatMode(next) === "BackCompat") !== isQuirky) {
      tell({ quirks: !isQuirky });
      return;
    }
    const nextRoot = rootOf(next);
    // What would act without a script. The policies stop it, too, but a browser may have connected
    // to the other end by the time it finds that it may not go there.
    for (const element of select(nextRoot, "base, link, script, meta[http-equiv]")) remove(element);
    for (const element of select(nextRoot, "iframe, frame, object, embed, portal, fencedframe"))
      for (const name of ["src", "srcdoc", "data"]) removePlain(element, name);
    if (html.length > largeInCharacters) replaceChildren(root, nextRoot);
    else morph(root, nextRoot);
    tell({ placed: true, height: root.scrollHeight });
  }

  function replaceChildren(old, next) {
    while (firstChild(old)) removeChild(old, firstChild(old));
    while (firstChild(next)) appendChild(old, firstChild(next));
    copyAttributes(old, next);
  }

  function morph(old, next) {
    copyAttributes(old, next);
    let here = firstChild(old);
    let there = firstChild(next);
    while (there) {
      const following = nextSibling(there);
      if (!here) {
        appendChild(old, there);
      } else {
        const after = nextSibling(here);
        if (nodeType(here) !== nodeType(there) || nodeName(here) !== nodeName(there))
          replaceChild(old, there, here);
        else if (nodeType(here) === Node.ELEMENT_NODE) morph(here, there);
        else if (here.data !== there.data) here.data = there.data;
        here = after;
      }
      there = following;
    }
    while (here) {
      const after = nextSibling(here);
      removeChild(old, here);
      here = after;
    }
  }

  function copyAttributes(old, next) {
    for (const { namespaceURI, localName } of [...attributesOf(old)])
      if (!hasAttribute(next, namespaceURI, localName)) removeAttribute(old, namespaceURI, localName);
    for (const { namespaceURI, name, localName, value } of [...attributesOf(next)])
      if (getAttribute(old, namespaceURI, localName) !== value)
        try {
          setAttribute(old, namespaceURI, name, value);
        } catch {
          // The parser takes names that nobody may set, as in <p "">.
        }
  }

  function tellScroll() {
    tell({ scroll: scrollY, height: root.scrollHeight });
  }

  // Links lead nowhere but inside the page. One of a drawing may be animated to lead elsewhere.
  function stay(event) {
    const link = event.target instanceof Element && closest(event.target, "[*|href]");
    if (!link) return;
    const inside =
      link instanceof HTMLAnchorElement && getAttribute(link, null, "href").startsWith("#");
    if (!inside) event.preventDefault();
  }

  addEventListener("message", (event) => {
    if (event.source !== parent || event.origin !== shell) return;
    const { page, scroll } = event.data;
    if (typeof page === "string") place(page);
    if (typeof scroll === "number") scrollTo({ top: scroll, behavior: "instant" });
  });
  addEventListener("scroll", () => requestAnimationFrame(tellScroll), { passive: true });
  addEventListener("click", stay, true);
  addEventListener("auxclick", stay, true);
  addEventListener("submit", (event) => event.preventDefault(), true);
  tell({ ready: true });
})();
