// A map of layers by experts on a canvas: sharp at any pixel density, and quick also for 58 layers of 256 experts.

const LABELS = 26; // room at the left for layer numbers
const TALLEST = 232; // all rows together
const LARGEST = 22;

export class Grid {
  constructor(canvas) {
    this.canvas = canvas;
    this.rows = [];
    this.columns = 0;
    this.value = () => 0;
    this.cursor = null; // [row, column] with a ring around it
    new ResizeObserver(() => this.draw()).observe(canvas);
  }

  // rows: the layers' numbers in the model; columns: experts of a layer.
  shape(rows, columns) {
    Object.assign(this, { rows, columns, cursor: null });
    this.draw();
  }

  // value(row, column) from 0 to 1 is the strength of the accent.
  show(value) {
    this.value = value;
    this.draw();
  }

  #measure() {
    const wide = Math.min(LARGEST, (this.canvas.clientWidth - LABELS) / this.columns);
    const width = wide >= 6 ? Math.floor(wide) : wide;
    const high = Math.min(width < 6 ? 12 : width, TALLEST / this.rows.length);
    return { width, height: high >= 6 ? Math.floor(high) : Math.max(2, high) };
  }

  draw() {
    const { canvas, rows, columns } = this;
    if (!rows.length || !columns || canvas.clientWidth <= LABELS) return;
    const { width, height } = this.#measure();
    const density = window.devicePixelRatio || 1;
    const tall = Math.ceil(height * rows.length);
    canvas.style.height = `${tall}px`;
    canvas.width = Math.round(canvas.clientWidth * density);
    canvas.height = Math.round(tall * density);

    const pen = canvas.getContext("2d");
    pen.scale(density, density);
    // The stylesheet decides the colours, for light and dark: they are read from the element itself.
    const { color: accent, fill: empty, stroke: ink, outlineColor: ring, fontFamily } = getComputedStyle(canvas);
    pen.clearRect(0, 0, canvas.clientWidth, tall);
    pen.textBaseline = "middle";
    pen.font = `11px ${fontFamily}`;
    const every = Math.ceil(14 / height);
    const gap = Math.min(width, height) >= 8 ? 2 : Math.min(width, height) >= 4 ? 1 : 0;
    rows.forEach((layer, row) => {
      const y = row * height;
      if (row % every === 0) {
        pen.fillStyle = ink;
        pen.fillText(`L${layer}`, 0, y + height / 2 + 0.5);
      }
      for (let column = 0; column < columns; column += 1) {
        const x = LABELS + column * width;
        const strength = this.value(row, column);
        pen.fillStyle = empty;
        box(pen, x, y, width - gap, height - gap);
        if (strength <= 0) continue;
        pen.globalAlpha = Math.min(1, strength);
        pen.fillStyle = accent;
        box(pen, x, y, Math.max(1.5, width - gap), height - gap);
        pen.globalAlpha = 1;
      }
    });
    if (!this.cursor) return;
    pen.strokeStyle = ring;
    pen.lineWidth = 1.5;
    pen.strokeRect(LABELS + this.cursor[1] * width - gap / 2, this.cursor[0] * height, width, Math.max(height - gap, 3));
  }

  // The [row, column] under a pointer event, or null.
  at(event) {
    if (!this.rows.length) return null;
    const { width, height } = this.#measure();
    const column = Math.floor((event.offsetX - LABELS) / width);
    const row = Math.floor(event.offsetY / height);
    return row >= 0 && row < this.rows.length && column >= 0 && column < this.columns ? [row, column] : null;
  }
}

function box(pen, x, y, width, height) {
  pen.beginPath();
  pen.roundRect(x, y, width, height, Math.min(3, width / 4, height / 4));
  pen.fill();
}
