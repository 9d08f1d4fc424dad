"""The words on composed pages: real words and names from Faker (MIT), and labels of interfaces.

Owns which languages there are and what a menu, a button or a table heading says in each. Knows
nothing about markup.
"""

from __future__ import annotations

import functools
import random

from faker import Faker

LICENCE = "Words and names: Faker (MIT). Labels: this project (Apache-2.0)."

_LOCALES = {
    "en": "en_US",
    "de": "de_DE",
    "fr": "fr_FR",
    "es": "es_ES",
    "it": "it_IT",
    "nl": "nl_NL",
}
_SHARES = (70, 9, 7, 7, 4, 3)

# What interfaces say, by place; the first word of a place may serve as a heading.
_LABELS: dict[str, dict[str, str]] = {
    "en": {
        "menu": "Home|About|Services|Products|Pricing|Blog|Contact|Team|Careers|Docs|Support|News|"
        "Features|Shop|Gallery|Events|Partners|FAQ|Portfolio|Help",
        "app": "Dashboard|Overview|Orders|Customers|Reports|Settings|Messages|Users|Billing|"
        "Projects|Tasks|Calendar|Files|Analytics|Inbox|Invoices|Profile|Products|Team|Log out",
        "action": "Get started|Learn more|Sign up|Buy now|Try for free|Contact us|Read more|"
        "Subscribe|Download|Book a demo|Join now|See plans|Start trial|View all|Order|Explore",
        "submit": "Send|Save|Submit|Log in|Sign in|Register|Continue|Create account|Search|"
        "Update|Confirm|Pay now|Apply",
        "field": "Name|Email|Password|Phone|Company|Address|City|Country|Message|Subject|"
        "Username|First name|Last name|Date|Card number|Website|Postal code",
        "column": "Name|Date|Status|Amount|Price|City|Role|Email|Orders|Total|Country|Item|"
        "Quantity|Owner|Type|Customer|ID|Score|Team|Updated",
        "status": "Active|Pending|Paid|Open|Closed|Done|Late|New|Draft|Shipped|Failed|Review",
        "metric": "Revenue|Users|Orders|Visits|Sales|Growth|Sessions|Errors|Downloads|Profit|"
        "New customers|Conversion|Uptime|Refunds|Tickets|Balance",
        "plan": "Basic|Pro|Team|Free|Starter|Premium|Business|Enterprise|Plus|Standard",
        "section": "Our services|Features|Why us|Latest news|Our team|What we do|Popular|"
        "Recent orders|Activity|Products|Testimonials|How it works|Pricing|Gallery|Contact|"
        "Frequently asked questions|Related|Categories|Summary|Details",
        "form": "Log in|Sign in|Create account|Contact us|Register|Checkout|Newsletter|Feedback|"
        "Reset password|Book a table|Search|Your profile|Settings|Welcome back",
        "per": "month|year|user|week",
        "legal": "Privacy|Terms|Imprint|Cookies|Contact|Help",
        "note": "All rights reserved|Made with care|Follow us|Stay in touch",
        "remember": "Remember me|I agree to the terms|Send me news|Keep me signed in",
        "forgot": "Forgot password?|No account yet?|Need help?",
        "error": "Page not found|Something went wrong|Coming soon|Under maintenance|Thank you",
    },
    "de": {
        "menu": "Start|Über uns|Leistungen|Produkte|Preise|Blog|Kontakt|Team|Karriere|Hilfe|"
        "Aktuelles|Shop|Galerie|Termine|Partner",
        "app": "Übersicht|Bestellungen|Kunden|Berichte|Einstellungen|Nachrichten|Benutzer|"
        "Rechnungen|Projekte|Aufgaben|Kalender|Dateien|Profil|Abmelden",
        "action": "Jetzt starten|Mehr erfahren|Anmelden|Jetzt kaufen|Kostenlos testen|"
        "Kontakt aufnehmen|Weiterlesen|Herunterladen|Alle ansehen|Bestellen",
        "submit": "Senden|Speichern|Anmelden|Registrieren|Weiter|Suchen|Bezahlen",
        "field": "Name|E-Mail|Passwort|Telefon|Firma|Adresse|Stadt|Land|Nachricht|Betreff|Datum",
        "column": "Name|Datum|Status|Betrag|Preis|Stadt|Rolle|Summe|Land|Artikel|Menge|Kunde",
        "status": "Aktiv|Offen|Bezahlt|Neu|Fertig|Entwurf|Versandt",
        "metric": "Umsatz|Besucher|Bestellungen|Verkauf|Wachstum|Fehler|Gewinn|Neue Kunden",
        "plan": "Basis|Pro|Team|Gratis|Premium|Firma|Plus",
        "section": "Unsere Leistungen|Aktuelles|Unser Team|Beliebt|Letzte Bestellungen|Produkte|"
        "So geht es|Preise|Galerie|Häufige Fragen|Details",
        "form": "Anmelden|Konto erstellen|Kontakt|Registrieren|Kasse|Ihr Profil|Willkommen",
        "per": "Monat|Jahr",
        "legal": "Datenschutz|Impressum|AGB|Kontakt|Hilfe",
        "note": "Alle Rechte vorbehalten|Folgen Sie uns",
        "remember": "Angemeldet bleiben|Ich stimme zu",
        "forgot": "Passwort vergessen?|Noch kein Konto?",
        "error": "Seite nicht gefunden|Bald verfügbar|Vielen Dank",
    },
    "fr": {
        "menu": "Accueil|Services|Produits|Tarifs|Blog|Contact|Aide|Boutique|Galerie|Histoire",
        "app": "Tableau de bord|Commandes|Clients|Rapports|Messages|Factures|Projets|Agenda|Profil",
        "action": "Commencer|En savoir plus|Acheter|Essai gratuit|Nous contacter|Lire la suite|"
        "Voir tout|Commander",
        "submit": "Envoyer|Valider|Connexion|Continuer|Rechercher|Payer",
        "field": "Nom|E-mail|Mot de passe|Adresse|Ville|Pays|Message|Sujet|Date",
        "column": "Nom|Date|Statut|Montant|Prix|Ville|Total|Pays|Article|Client",
        "status": "Actif|En attente|Nouveau|Brouillon|Envoyé",
        "metric": "Revenus|Visites|Commandes|Ventes|Croissance|Erreurs",
        "plan": "Base|Pro|Libre|Premium|Plus",
        "section": "Nos services|Actualités|Notre équipe|Produits|Tarifs|Galerie|Avis",
        "form": "Connexion|Créer un compte|Contact|Inscription|Votre profil|Bienvenue",
        "per": "mois|an",
        "legal": "Mentions|Contact|Cookies|Aide",
        "note": "Suivez-nous|Restons en contact",
        "remember": "Se souvenir de moi|Accepter",
        "forgot": "Besoin d'aide ?|Pas encore inscrit ?",
        "error": "Page introuvable|Merci",
    },
    "es": {
        "menu": "Inicio|Servicios|Productos|Precios|Blog|Contacto|Equipo|Ayuda|Tienda|Noticias",
        "app": "Panel|Pedidos|Clientes|Informes|Mensajes|Usuarios|Facturas|Proyectos|Perfil",
        "action": "Empezar|Saber más|Comprar|Prueba gratis|Contactar|Leer más|Ver todo|Descargar",
        "submit": "Enviar|Guardar|Entrar|Continuar|Buscar|Pagar",
        "field": "Nombre|Correo|Usuario|Empresa|Ciudad|Mensaje|Asunto|Fecha",
        "column": "Nombre|Fecha|Estado|Importe|Precio|Ciudad|Total|Cliente|Cantidad",
        "status": "Activo|Pendiente|Pagado|Abierto|Nuevo|Enviado",
        "metric": "Ingresos|Visitas|Pedidos|Ventas|Usuarios|Errores",
        "plan": "Gratis|Pro|Equipo|Premium|Plus",
        "section": "Nuestros servicios|Noticias|Nuestro equipo|Productos|Precios|Detalles",
        "form": "Entrar|Crear cuenta|Contacto|Registro|Su perfil|Bienvenido",
        "per": "mes",
        "legal": "Privacidad|Aviso legal|Cookies|Ayuda",
        "note": "Todos los derechos reservados",
        "remember": "Recordarme|Acepto",
        "forgot": "Sin cuenta?",
        "error": "No encontrado|Gracias",
    },
    "it": {
        "menu": "Home|Chi siamo|Servizi|Prodotti|Prezzi|Blog|Contatti|Negozio",
        "app": "Ordini|Clienti|Rapporti|Messaggi|Utenti|Fatture|Progetti|Profilo",
        "action": "Inizia ora|Scopri di più|Acquista|Prova gratis|Leggi tutto|Contattaci",
        "submit": "Invia|Salva|Accedi|Continua|Cerca|Paga",
        "field": "Nome|Email|Password|Azienda|Messaggio|Oggetto|Data",
        "column": "Nome|Data|Stato|Importo|Prezzo|Totale|Cliente",
        "status": "Attivo|In attesa|Pagato|Nuovo|Spedito",
        "metric": "Ricavi|Visite|Ordini|Vendite|Utenti|Errori",
        "plan": "Base|Pro|Gratis|Premium|Plus",
        "section": "I nostri servizi|Notizie|Prodotti|Prezzi|Dettagli",
        "form": "Accedi|Crea un account|Contatti|Registrati|Benvenuto",
        "per": "mese|anno",
        "legal": "Privacy|Contatti|Cookie",
        "note": "Tutti i diritti riservati|Seguici",
        "remember": "Ricordami|Accetto",
        "forgot": "Serve aiuto?",
        "error": "Pagina non trovata|Grazie",
    },
    "nl": {
        "menu": "Home|Over ons|Diensten|Producten|Prijzen|Blog|Contact|Winkel|Nieuws",
        "app": "Overzicht|Bestellingen|Klanten|Rapporten|Berichten|Projecten|Agenda|Profiel",
        "action": "Begin nu|Meer lezen|Bestellen|Gratis proberen|Neem contact op|Bekijk alles",
        "submit": "Versturen|Opslaan|Inloggen|Verder|Zoeken|Betalen",
        "field": "Naam|E-mail|Wachtwoord|Bedrijf|Adres|Stad|Bericht|Datum",
        "column": "Naam|Datum|Status|Bedrag|Prijs|Stad|Totaal|Klant",
        "status": "Actief|Open|Betaald|Nieuw|Klaar|Verzonden",
        "metric": "Omzet|Bezoekers|Bestellingen|Verkoop|Groei|Fouten",
        "plan": "Basis|Pro|Gratis|Premium|Plus",
        "section": "Onze diensten|Nieuws|Ons team|Producten|Prijzen|Details",
        "form": "Inloggen|Account maken|Contact|Registreren|Welkom terug",
        "per": "maand|jaar",
        "legal": "Privacy|Voorwaarden|Contact",
        "note": "Alle rechten voorbehouden|Volg ons",
        "remember": "Onthoud mij|Akkoord",
        "forgot": "Hulp nodig?",
        "error": "Pagina niet gevonden|Bedankt",
    },
}
_CURRENCIES = {"en": ("$", "£", "€"), "de": ("€",)}


@functools.cache
def _faker(locale: str) -> Faker:
    return Faker(locale, use_weighting=False)


class Words:
    """The text of one page, all in one language, drawn from `rng` alone."""

    def __init__(self, rng: random.Random) -> None:
        self.language = rng.choices(tuple(_LOCALES), _SHARES)[0]
        self._rng = rng
        self._fake = _faker(_LOCALES[self.language])
        self._fake.seed_instance(rng.getrandbits(64))
        self.brand = self._brand()
        self._currency = rng.choice(_CURRENCIES.get(self.language, ("€",)))

    def labels(self, place: str, count: int) -> list[str]:
        """Different labels; fewer than `count` where a language has fewer."""
        known = _LABELS[self.language][place].split("|")
        return self._rng.sample(known, min(count, len(known)))

    def label(self, place: str) -> str:
        return self.labels(place, 1)[0]

    def phrase(self, fewest: int, most: int) -> str:
        """Words without a full stop, the first one with a capital."""
        words = [self._fake.word() for _ in range(self._rng.randint(fewest, most))]
        text = " ".join(words)
        return text[:1].upper() + text[1:]

    def heading(self) -> str:
        if self.language == "en" and self._rng.random() < 0.4:
            return (
                self._fake.catch_phrase() if self._rng.random() < 0.5 else self._fake.bs().title()
            )
        text = self.phrase(2, 5)
        return text.title() if self.language == "en" and self._rng.random() < 0.3 else text

    def sentence(self, fewest: int = 6, most: int = 12) -> str:
        return f"{self.phrase(fewest, most)}{self._rng.choices('.!?', (12, 1, 1))[0]}"

    def text(self, sentences: int) -> str:
        return " ".join(self.sentence() for _ in range(sentences))

    def latin(self, sentences: int) -> str:
        """What stands in templates where a text will be."""
        latin = _faker("la")
        latin.seed_instance(self._rng.getrandbits(64))
        return " ".join(latin.sentence(self._rng.randint(5, 12)) for _ in range(sentences))

    def sign(self) -> str:
        """A short text that is no sentence: capitals, a name of a file, numbers in brackets."""
        rng = self._rng
        number, word, other = rng.randint(1, 99), self._fake.word(), self._fake.word()
        return rng.choice(
            (
                self.title().upper(),
                f"{word} {other}",
                f".{word}-{other}",
                f"/{word}/{other}.js",
                f"(+{number}%) {word} {other}",
                f"{self.title()} ({number})",
                f"{number} {word}",
                f"{self.title()} →",
                f"© {rng.randint(2012, 2027)} {other}",
                f"{self.date()} - {self.date()}",
                f"{word}, {other} & {self.title()}",
            )
        )

    def title(self) -> str:
        return self.phrase(1, 3)

    def person(self) -> str:
        return f"{self._fake.first_name()} {self._fake.last_name()}"

    def job(self) -> str:
        return self._fake.job().split(",")[0].split("/")[0].strip().capitalize()

    def city(self) -> str:
        return self._fake.city()

    def company(self) -> str:
        return self._fake.company()

    def email(self) -> str:
        return self._fake.safe_email()

    def number(self) -> str:
        rng = self._rng
        kind = rng.randrange(5)
        if kind == 0:
            return f"{rng.randint(2, 99)}%"
        if kind == 1:
            return f"{self._currency}{rng.randint(1, 99)},{rng.randint(0, 999):03}"
        if kind == 2:
            return f"{rng.randint(1, 99)},{rng.randint(0, 999):03}"
        if kind == 3:
            return f"{rng.randint(1, 99)}.{rng.randint(0, 9)}k"
        return str(rng.randint(2, 999))

    def price(self) -> str:
        cents = self._rng.choice((".00", ".99", ".50", "", ""))
        return f"{self._currency}{self._rng.randint(3, 250)}{cents}"

    def date(self) -> str:
        rng = self._rng
        year, month, day = rng.randint(2019, 2027), rng.randint(1, 12), rng.randint(1, 28)
        if self.language == "en":
            months = [
                "Jan",
                "Feb",
                "Mar",
                "Apr",
                "May",
                "Jun",
                "Jul",
                "Aug",
                "Sep",
                "Oct",
                "Nov",
                "Dec",
            ]
            return f"{months[month - 1]} {day}, {year}"
        return f"{day:02}.{month:02}.{year}"

    def cell(self, column: str) -> str:
        """Something that may stand below `column`."""
        draw = self._rng.choice
        kinds = {
            "date": self.date,
            "status": lambda: self.label("status"),
            "person": self.person,
            "city": self.city,
            "price": self.price,
            "number": lambda: str(self._rng.randint(1, 999)),
            "word": self.title,
        }
        name = column.casefold()
        for kind, starts in (
            ("date", ("dat", "fech", "upd")),
            ("status", ("stat", "esta", "stato")),
            ("person", ("nam", "nom", "cust", "owner", "kund", "client", "klant")),
            ("city", ("cit", "stad", "vill", "ciud", "count", "land", "pays")),
            ("price", ("amou", "pric", "tot", "betr", "prei", "mont", "prix", "imp", "prec")),
            ("number", ("qua", "ord", "id", "sco", "men", "cant")),
        ):
            if name.startswith(starts):
                return kinds[kind]()
        return kinds[draw(("word", "number", "word"))]()

    def _brand(self) -> str:
        kind = self._rng.randrange(3)
        if kind == 0:
            return self._fake.last_name()
        word = self._fake.word().capitalize()
        return word + (self._fake.word() if kind == 1 and len(word) < 6 else "")
