// Moving over one chart shows every chart of its group at that update, or position.
const show = {
  percent: v => (100 * v).toFixed(1) + ' %',
  bytes: v => {
    const units = ['B', 'KiB', 'MiB', 'GiB', 'TiB'];
    let i = 0;
    while (v >= 1024 && i < 4) { v /= 1024; i++; }
    return +v.toPrecision(3) + ' ' + units[i];
  },
  '': v => {
    if (v === 0) return '0';
    const size = Math.abs(v);
    if (size >= 1000) return Math.round(v).toLocaleString('en-US');
    return size < 0.001 ? v.toExponential(2) : v.toPrecision(4);
  },
};
function nearest(points, x) {
  let low = 0, high = points.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (points[middle][0] < x) low = middle + 1; else high = middle;
  }
  if (low > 0 && x - points[low - 1][0] < points[low][0] - x) low--;
  return points[low];
}
for (const group of document.querySelectorAll('.charts')) {
  const charts = [...group.querySelectorAll('figure.chart')].map(figure => ({
    data: JSON.parse(figure.querySelector('script').textContent),
    area: figure.querySelector('.area'),
    cross: figure.querySelector('.cross'),
    values: [...figure.querySelectorAll('output')].map(output => ({ output, last: output.textContent })),
  }));
  const at = x => {
    for (const { data, cross, values } of charts) {
      const step = data.series.length ? nearest(data.series[0], x)[0] : x;
      const left = (step - data.x[0]) / (data.x[1] - data.x[0]);
      cross.style.left = 100 * left + '%';
      cross.style.display = left < -0.001 || left > 1.001 ? 'none' : 'block';
      cross.firstChild.textContent = Math.round(step).toLocaleString('en-US');
      cross.firstChild.style.transform = `translateX(${-100 * Math.min(1, Math.max(0, left))}%)`;
      values.forEach(({ output }, i) => { output.textContent = show[data.unit](nearest(data.series[i], x)[1]); });
    }
  };
  const leave = () => {
    for (const { cross, values } of charts) {
      cross.style.display = 'none';
      values.forEach(({ output, last }) => { output.textContent = last; });
    }
  };
  for (const { data, area } of charts) {
    area.addEventListener('pointermove', event => {
      const box = area.getBoundingClientRect();
      const share = Math.min(1, Math.max(0, (event.clientX - box.left) / box.width));
      at(data.x[0] + share * (data.x[1] - data.x[0]));
    });
    area.addEventListener('pointerleave', leave);
  }
}
for (const button of document.querySelectorAll('button.copy')) {
  button.hidden = !navigator.clipboard;
  button.addEventListener('click', () => {
    navigator.clipboard.writeText(button.nextElementSibling.textContent.trim());
    button.textContent = 'copied';
    setTimeout(() => { button.textContent = 'copy'; }, 1500);
  });
}
