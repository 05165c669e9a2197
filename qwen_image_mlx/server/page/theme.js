// Sets the saved theme before the page is drawn. Without one, the system's choice applies.
const remembered = localStorage.getItem("theme");
if (remembered) document.documentElement.dataset.theme = remembered;
