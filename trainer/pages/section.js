// Sections of the page that is open, each as HTML that needs no style sheet.
// limit: most characters of a section. Returns [{html, style, width, height}].
(limit) => {
  const PROPERTIES = [
    'display', 'flex-direction', 'flex-wrap', 'justify-content', 'align-items', 'flex-grow',
    'column-gap', 'row-gap', 'float', 'margin-top', 'margin-right', 'margin-bottom', 'margin-left',
    'padding-top', 'padding-right', 'padding-bottom', 'padding-left', 'background-color', 'color',
    'font-size', 'font-weight', 'font-style', 'text-align', 'text-transform',
    'text-decoration-line', 'line-height', 'list-style-type', 'white-space',
    'border-top-width', 'border-right-width', 'border-bottom-width', 'border-left-width',
    'border-top-style', 'border-right-style', 'border-bottom-style', 'border-left-style',
    'border-top-color', 'border-right-color', 'border-bottom-color', 'border-left-color',
    'border-top-left-radius', 'border-top-right-radius', 'border-bottom-left-radius',
    'border-bottom-right-radius', 'border-collapse', 'vertical-align',
  ];
  const KEPT = new Set(('nav header main section article aside footer form div table thead tbody tr '
    + 'th td ul ol li h1 h2 h3 h4 h5 h6 p blockquote pre code label hr br input textarea button a b '
    + 'strong em i small span select option dl dt dd').split(' '));
  const GONE = new Set('script style svg iframe canvas noscript template link meta video audio'.split(' '));
  const frame = document.createElement('iframe');
  frame.style.cssText = 'position:absolute;left:0;top:0;border:0;visibility:hidden;height:4000px';
  document.documentElement.append(frame);
  const empty = frame.contentDocument;
  empty.open();
  empty.write('<!DOCTYPE html><html><head><style>*{box-sizing:border-box}</style></head><body></body></html>');
  empty.close();

  const opaque = (e) => {
    for (; e; e = e.parentElement) {
      const color = getComputedStyle(e).backgroundColor;
      if (!/^rgba\(.*, 0\)$|^transparent$/.test(color)) return color;
    }
    return 'rgb(255, 255, 255)';
  };
  const seen = (e) => {
    const style = getComputedStyle(e), box = e.getBoundingClientRect();
    return style.display !== 'none' && style.visibility === 'visible' && style.opacity !== '0'
      && (box.width > 1 && box.height > 1 || style.display === 'contents')
      && !['absolute', 'fixed', 'sticky'].includes(style.position);
  };
  const family = (css) => /mono|courier/i.test(css.split(',')[0]) ? 'monospace'
    : /(^|[^-])serif|georgia|times|merriweather|garamond/i.test(css.replace(/sans-serif/g, ''))
      ? 'serif' : 'sans-serif';

  const apart = (node) => !node || node.nodeType === 8
    || node.nodeType === 1 && !getComputedStyle(node).display.startsWith('inline');

  // A copy without styles, and the pairs (original, copy) from the top down.
  const copied = (from, pairs) => {
    const tag = from.localName;
    if (GONE.has(tag) || !seen(from) && tag !== 'br' && tag !== 'option') return null;
    if (tag === 'img' || tag === 'picture' || tag === 'figure' && !from.textContent.trim()) {
      const to = empty.createElement('div');
      pairs.push([from, to, true]);
      return to;
    }
    const to = empty.createElement(KEPT.has(tag) ? tag : 'div');
    for (const name of { input: ['type', 'placeholder', 'value'], textarea: ['placeholder'],
      td: ['colspan', 'rowspan'], th: ['colspan', 'rowspan'] }[tag] || [])
      if (from.getAttribute(name)) to.setAttribute(name, from.getAttribute(name));
    if (tag === 'input' && from.checked) to.setAttribute('checked', '');
    pairs.push([from, to, false]);
    for (const child of from.childNodes) {
      if (child.nodeType === 3) {
        let text = child.data.replace(/\s+/g, ' ');
        // White space beside blocks is not drawn.
        if (apart(child.previousSibling)) text = text.trimStart();
        if (apart(child.nextSibling)) text = text.trimEnd();
        // Icon fonts have private characters.
        if (!/[\ue000-\uf8ff]/.test(text)) to.append(text);
      } else if (child.nodeType === 1) {
        const copy = copied(child, pairs);
        if (copy) to.append(copy);
      }
    }
    const paints = getComputedStyle(from).backgroundColor !== 'rgba(0, 0, 0, 0)'
      || parseFloat(getComputedStyle(from).borderTopWidth) > 0;
    if (!to.childNodes.length && !paints && !['input', 'textarea', 'br', 'hr', 'td', 'th'].includes(tag)) {
      pairs.splice(pairs.findIndex(([f]) => f === from), 1);
      return null;
    }
    return to;
  };

  const cut = (root) => {
    const pairs = [], style = getComputedStyle(root), box = root.getBoundingClientRect();
    const copy = copied(root, pairs);
    if (!copy) return null;
    const parent = root.parentElement || root;
    const base = `margin:0;background:${opaque(root)};color:${style.color};`
      + `font-family:${family(style.fontFamily)};font-size:${getComputedStyle(parent).fontSize}`;
    const width = Math.round(box.width);
    frame.style.width = `${width}px`;
    empty.body.style.cssText = base;
    empty.body.replaceChildren(copy);
    for (const [from, to, picture] of pairs) {
      const wanted = getComputedStyle(from), has = frame.contentWindow.getComputedStyle(to);
      const place = from.getBoundingClientRect();
      if (picture) {
        const width = Math.round(place.width), height = Math.round(place.height);
        to.style.cssText = `display:inline-block;width:${width}px;height:${height}px;background:#ccc`;
        if (wanted.borderTopLeftRadius !== '0px') to.style.borderRadius = wanted.borderTopLeftRadius;
        continue;
      }
      for (const name of PROPERTIES) {
        const value = wanted.getPropertyValue(name);
        if (to === copy && name.startsWith('margin')) continue;
        if (name === 'line-height' && wanted.display === 'inline') continue;
        if (has.getPropertyValue(name) === value) continue;
        // Colours and styles of borders that are not there say nothing.
        const side = name.match(/^border-(top|right|bottom|left)-(style|color)$/);
        if (side && wanted.getPropertyValue(`border-${side[1]}-width`) === '0px') continue;
        to.style.setProperty(name, value);
      }
      const image = wanted.backgroundImage;
      if (image.includes('gradient') && wanted.backgroundColor === 'rgba(0, 0, 0, 0)') {
        const color = image.match(/rgba?\([^)]*\)/);
        if (color) to.style.backgroundColor = color[0];
      }
      if (wanted.display === 'inline' || to === copy) continue;
      if (Math.abs(to.getBoundingClientRect().width - place.width) > 3) {
        to.style.width = `${Math.round(place.width)}px`;
        if (wanted.flexGrow !== '0') to.style.flexGrow = '';
      }
      const leaf = !to.textContent.trim() || to.localName === 'input' || to.localName === 'textarea';
      if (leaf && Math.abs(to.getBoundingClientRect().height - place.height) > 2)
        to.style.height = `${Math.round(place.height)}px`;
    }
    // Boxes that neither look like anything nor place anything.
    for (const e of [...copy.querySelectorAll('div,span,main,section')].reverse())
      if (!e.getAttribute('style') && (e.children.length === 1 && e.childNodes.length === 1 || e.localName === 'span'))
        e.replaceWith(...e.childNodes);
    for (const e of [copy, ...copy.querySelectorAll('*')])
      if (e.getAttribute('style') === '') e.removeAttribute('style');
    return { html: copy.outerHTML, style: base, width, height: Math.round(box.height) };
  };

  const found = [];
  const visit = (e) => {
    if (GONE.has(e.localName) || !seen(e)) return;
    const box = e.getBoundingClientRect();
    if (box.width < 280 || box.height < 100 || e.innerText.trim().length < 40) return;
    if (e !== document.body && e.innerText.length < limit && box.height < 1.5 * box.width && box.height > 0.12 * box.width) {
      const section = cut(e);
      if (section && section.html.length + section.style.length < limit) {
        found.push(section);
        return;
      }
    }
    for (const child of e.children) visit(child);
  };
  visit(document.body);
  frame.remove();
  return found;
}
