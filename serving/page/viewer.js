/* A picture of a gallery, larger: the wheel, two fingers and the keys + and - zoom, dragging and the arrows move it. */
() => {
  const dialog = document.createElement('dialog')
  dialog.id = 'viewer'
  dialog.setAttribute('aria-label', 'The chosen picture, larger')
  dialog.innerHTML = `<img alt="" draggable="false"><p>
    <button data-does="smaller" aria-label="smaller">−</button><output></output>
    <button data-does="larger" aria-label="larger">+</button>
    <button data-does="fit">fit</button><button data-does="whole">1:1</button>
    <button data-does="close">close</button></p>`
  document.body.append(dialog)
  const image = dialog.querySelector('img'), said = dialog.querySelector('output')
  const STEP = 1.25, MOVE = 60, SMALLEST = 0.02, LARGEST = 64
  const fingers = new Map()
  let scale = 1, x = 0, y = 0 // x and y: where the middle of the picture is, from that of the window

  const show = () => {
    image.style.transform = `translate(-50%, -50%) translate(${x}px, ${y}px) scale(${scale})`
    said.textContent = `${Math.round(scale * 100)} %`
  }
  const move = (right, down) => { x += right; y += down; show() }
  // what is at this place of the window stays there
  const zoom = (by, left = innerWidth / 2, top = innerHeight / 2) => {
    const before = scale
    scale = Math.min(LARGEST, Math.max(SMALLEST, scale * by))
    const right = left - innerWidth / 2, down = top - innerHeight / 2
    x = right - (right - x) * scale / before
    y = down - (down - y) * scale / before
    show()
  }
  const at = wanted => { scale = wanted; x = y = 0; show() }
  const does = {
    larger: () => zoom(STEP), smaller: () => zoom(1 / STEP), whole: () => at(1), close: () => dialog.close(),
    fit: () => at(Math.min(innerWidth / image.naturalWidth, innerHeight / image.naturalHeight)),
  }
  const keys = {
    '+': does.larger, '=': does.larger, '-': does.smaller, 0: does.fit, 1: does.whole,
    ArrowLeft: () => move(MOVE, 0), ArrowRight: () => move(-MOVE, 0),
    ArrowUp: () => move(0, MOVE), ArrowDown: () => move(0, -MOVE),
  }
  const middle = () => {
    const [one, other = one] = [...fingers.values()]
    return [(one.x + other.x) / 2, (one.y + other.y) / 2, Math.hypot(one.x - other.x, one.y - other.y)]
  }
  image.addEventListener('load', does.fit)
  dialog.addEventListener('click', event => does[event.target.dataset.does]?.())
  dialog.addEventListener('keydown', event => {
    if (keys[event.key] === undefined || event.ctrlKey || event.metaKey) return
    event.preventDefault()
    keys[event.key]()
  })
  dialog.addEventListener('wheel', event => {
    event.preventDefault()
    zoom(Math.exp(-Math.max(-200, Math.min(200, event.deltaY)) / 400), event.clientX, event.clientY)
  }, { passive: false })
  image.addEventListener('pointerdown', event => {
    image.setPointerCapture(event.pointerId)
    fingers.set(event.pointerId, { x: event.clientX, y: event.clientY })
  })
  image.addEventListener('pointermove', event => {
    if (!fingers.has(event.pointerId)) return
    const [left, top, apart] = middle()
    fingers.set(event.pointerId, { x: event.clientX, y: event.clientY })
    const [right, down, now] = middle()
    move(right - left, down - top)
    if (apart > 0 && now > 0) zoom(now / apart, right, down)
  })
  const lift = event => fingers.delete(event.pointerId)
  image.addEventListener('pointerup', lift)
  image.addEventListener('pointercancel', lift)
  window.enginecastLarger = part => {
    const shown = document.querySelector(`${part} [data-testid="detailed-image"], ${part} .preview img, ${part} img`)
    if (shown === null) return
    image.src = shown.src
    image.alt = shown.alt
    dialog.showModal()
  }
}
