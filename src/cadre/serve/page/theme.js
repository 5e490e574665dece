// Before anything is painted: the colours chosen last time. (A module would come too late, with a flash of the others.)

try {
  const kept = localStorage.getItem("cadre.theme");
  if (kept === "dark" || kept === "light") document.documentElement.dataset.theme = kept;
} catch {
  // Storage is forbidden: the system's colours.
}
